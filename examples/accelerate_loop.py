"""Accelerate: a prepared optimizer, accumulated gradients, and a checkpoint that continues."""

import torch
from accelerate import Accelerator
from common import place
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeopt import SafetyProbe, safeguard
from safeopt.data import collate, encode, read_examples
from safeopt.safety_examples import read_safety_batches

here = place(__doc__)
accelerator = Accelerator(gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained(here.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(here.model)
model.to(accelerator.device)

batches, _ = read_safety_batches(model, tokenizer, here.safety)
probe = SafetyProbe(model, batches, opening=4)
inner = safeguard(torch.optim.AdamW(model.parameters(), lr=2e-5), probe, basis="int8")

rows = [encode(tokenizer, example, 512) for example in read_examples(here.train)]
loader = torch.utils.data.DataLoader(
    rows, batch_size=2, shuffle=True, collate_fn=lambda some: collate(some, tokenizer.pad_token_id)
)
model, optimizer, loader = accelerator.prepare(model, inner, loader)
model.train()
while inner.safety.step_count < here.steps:
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if inner.safety.step_count == here.steps:
            break
inner.restore()
accelerator.save_state(here.out)  # accelerator.load_state continues from it
print(f"alignment loss at the end: {inner.safety.measured:.3f}")
