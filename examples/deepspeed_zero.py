"""DeepSpeed ZeRO 2, a plain loop: torchrun --nproc-per-node 2 examples/deepspeed_zero.py."""

import deepspeed
import torch
import torch.distributed as dist
from common import place, same_on_all_ranks
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeopt import SafetyProbe
from safeopt.data import collate, encode, read_examples
from safeopt.integrations.deepspeed import protect
from safeopt.safety_examples import read_safety_batches

deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
here = same_on_all_ranks(place(__doc__))

tokenizer = AutoTokenizer.from_pretrained(here.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(here.model)
batches, _ = read_safety_batches(model, tokenizer, here.safety)
probe = SafetyProbe(model, batches, opening=4)

config = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True},
}
base = torch.optim.AdamW(model.parameters(), lr=2e-5)
engine = deepspeed.initialize(model=model, optimizer=base, config=config)[0]
optimizer = protect(engine, probe)

rows = [encode(tokenizer, example, 512) for example in read_examples(here.train)]
sampler = DistributedSampler(rows, seed=0)
loader = DataLoader(
    rows,
    batch_size=2,
    sampler=sampler,
    collate_fn=lambda some: collate(some, tokenizer.pad_token_id),
)
epoch = 0
while optimizer.safety.step_count < here.steps:
    sampler.set_epoch(epoch)
    epoch += 1
    for batch in loader:
        loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        if optimizer.safety.step_count == here.steps:
            break

optimizer.restore()  # on all ranks
engine.save_checkpoint(here.out)
if dist.get_rank() == 0:
    print(f"alignment loss at the end: {optimizer.safety.measured:.3f}")
