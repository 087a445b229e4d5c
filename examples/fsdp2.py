"""FSDP2 (`fully_shard`), a plain loop: torchrun --nproc-per-node 2 examples/fsdp2.py."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import place, same_on_all_ranks
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeopt import ProjectedAdamW, SafetyProbe
from safeopt.data import collate, encode, read_examples
from safeopt.safety_examples import read_safety_batches

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
here = same_on_all_ranks(place(__doc__))
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)

tokenizer = AutoTokenizer.from_pretrained(here.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(here.model).to(device)
batches, _ = read_safety_batches(model, tokenizer, here.safety)

mesh = init_device_mesh(device.type, (dist.get_world_size(),))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
probe = SafetyProbe(model, batches, opening=4)
optimizer = ProjectedAdamW(model.parameters(), lr=2e-5, probe=probe)

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
        model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.safety.step_count == here.steps:
            break

optimizer.restore()  # on all ranks
model_state, optimizer_state = get_state_dict(model, optimizer)
dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=here.out)
if dist.get_rank() == 0:
    print(f"alignment loss at the end: {optimizer.safety.measured:.3f}")
dist.destroy_process_group()
