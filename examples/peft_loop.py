"""A DoRA adapter in a plain loop; the loss is the KL to the model with its adapter off."""

import torch
from common import place
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeopt import ProjectedAdamW
from safeopt.data import collate, encode, read_examples
from safeopt.integrations.peft import adapter_parameters, safety_probe
from safeopt.safety_examples import read_safety_batches

here = place(__doc__)
tokenizer = AutoTokenizer.from_pretrained(here.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(here.model)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, use_dora=True))

batches, _ = read_safety_batches(model, tokenizer, here.safety)
probe = safety_probe(model, batches, loss="kl")
optimizer = ProjectedAdamW(adapter_parameters(model), lr=2e-4, probe=probe)

rows = [encode(tokenizer, example, 512) for example in read_examples(here.train)]
loader = torch.utils.data.DataLoader(
    rows, batch_size=4, shuffle=True, collate_fn=lambda some: collate(some, tokenizer.pad_token_id)
)
model.train()
while optimizer.safety.step_count < here.steps:
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.safety.step_count == here.steps:
            break
measured = optimizer.restore()
model.save_pretrained(here.out)
torch.save(optimizer.state_dict(), f"{here.out}/optimizer.pt")
print(f"KL to the aligned model at the end: {measured.alignment_loss:.4f} nats a token")
