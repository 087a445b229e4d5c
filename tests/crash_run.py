"""A training run that checkpoints every other step, for `test_crash`: started, killed, resumed.

python tests/crash_run.py NAME FOLDER STEPS

It writes ``FOLDER/step-N.pt`` (model, optimizer, RNG, learning-rate schedule), resumes from the
latest one that is there, and prints which safeopt it runs, then a line after every step. Dropout
and the data draw from torch's global generator. The model is plain torch, so that a process starts
in a second or two.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_models import VOCAB, safety_batch
from torch import Tensor, nn

import safeopt
from safeopt import (
    PreconditionedSGD,
    ProjectedAdamW,
    RefreshPolicy,
    SafetyProbe,
    SafetySAM,
    safeguard,
)

SAFETY = {"rank": 6, "refresh": RefreshPolicy.fixed(3), "budget": 0.0, "trial_examples": 2}
BUILD = {
    "ProjectedAdamW": lambda params, safety: ProjectedAdamW(params, lr=1e-2, **safety),
    "SafetySAM-lookahead": lambda params, safety: SafetySAM(params, lr=1e-2, **safety),
    "SafetySAM-two_pass": lambda params, safety: SafetySAM(
        params, lr=1e-2, mode="two_pass", **safety
    ),
    "PreconditionedSGD": lambda params, safety: PreconditionedSGD(
        params, lr=1e-2, momentum=0.9, **safety
    ),
    "safeguard": lambda params, safety: safeguard(
        torch.optim.RMSprop(params, lr=1e-3, momentum=0.5), safety.pop("probe"), **safety
    ),
}


class Net(nn.Module):
    """Next-token prediction from the present token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Embedding(VOCAB, 16)
        self.hidden = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(16, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.dropout(torch.tanh(self.hidden(self.inside(ids)))))


def losses(model: nn.Module, batch) -> Tensor:
    """Mean NLL of each example's labels."""
    logits = model(batch["input_ids"])[:, :-1]
    labels = batch["labels"][:, 1:]
    nll = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return nll.sum(1) / (labels != -100).sum(1)


def build(name: str):
    """The model and its optimizer."""
    model = Net()
    batches = [safety_batch(), safety_batch(seed=1)]
    probe = SafetyProbe(model, batches, loss=losses)
    return model, BUILD[name](list(model.parameters()), {**SAFETY, "probe": probe})


def main(name: str, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    model, optimizer = build(name)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)
    torch.manual_seed(1)
    start = 0
    done = sorted(folder.glob("step-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
    if done:
        saved = torch.load(done[-1], weights_only=True)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])

    def closure() -> torch.Tensor:
        ids = torch.randint(4, VOCAB, (4, 8))  # of torch's global generator
        optimizer.zero_grad()
        loss = losses(model, {"input_ids": ids, "labels": ids}).mean()
        loss.backward()
        return loss.detach()

    for step in range(start + 1, steps + 1):
        if isinstance(optimizer, SafetySAM):
            optimizer.train()
        optimizer.step(closure)
        scheduler.step()
        if step % 2 == 0:
            save(folder / f"step-{step}.pt", model, optimizer, scheduler, step)
        print(step, flush=True)


def save(path: Path, model, optimizer, scheduler, step: int) -> None:
    """Written beside its place and then moved there, so that a crash leaves no half a file."""
    if isinstance(optimizer, SafetySAM):
        optimizer.eval()
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


if __name__ == "__main__":
    print(safeopt.__file__, flush=True)
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
