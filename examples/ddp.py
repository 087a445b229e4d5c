"""DistributedDataParallel, a plain loop: torchrun --nproc-per-node 2 examples/ddp.py."""

from pathlib import Path

import torch
import torch.distributed as dist
from common import place, same_on_all_ranks
from torch.nn.parallel import DistributedDataParallel
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

ddp = DistributedDataParallel(model)
probe = SafetyProbe(ddp, batches, opening=4)  # each rank looks at its share of the safety examples
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
        ddp(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.safety.step_count == here.steps:
            break

optimizer.restore()  # on all ranks
if dist.get_rank() == 0:
    Path(here.out).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(here.out)
    torch.save(optimizer.state_dict(), Path(here.out, "optimizer.pt"))
    print(f"alignment loss at the end: {optimizer.safety.measured:.3f}")
dist.barrier()  # nobody leaves while rank 0 still writes
dist.destroy_process_group()
