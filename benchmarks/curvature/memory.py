"""Peak memory of training all parameters, plain and protected, each in a process of its own.

``python -m benchmarks.curvature.memory --optimizer adamw|projected_adamw [--tiny]`` takes a few
steps and prints the process's peak as JSON. `measure_memory` runs both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.curvature.problem import SMALL, SMOLLM2, Bench, Setting
from benchmarks.tasks import single_batches, task_loss
from safeopt import ProjectedAdamW, RefreshPolicy, SafetyProbe

OPTIMIZERS = ("adamw", "projected_adamw")
_RATE = 1e-5
# Refreshes so dense that the basis has all its directions after few steps.
_EVERY = 4


def measure_memory(setting: Setting) -> dict[str, Any]:
    """Run each optimizer in a fresh process.

    Returns:
        What each process printed, and the ratio of the peaks.

    Raises:
        RuntimeError: if a process fails, with the end of what it said.
    """
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        command = [sys.executable, "-m", "benchmarks.curvature.memory", "--optimizer", name]
        command += ["--tiny"] if setting is SMALL else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    peaks = [found[name]["peak_bytes"] for name in OPTIMIZERS]
    found["ratio"] = peaks[1] / peaks[0]
    return found


def peak_after_steps(setting: Setting, name: str) -> dict[str, Any]:
    """Train all parameters for a few steps in this process and read its peak."""
    bench = Bench(setting)
    model = bench.model.requires_grad_(True).train()
    params = list(model.parameters())
    storage = None
    if name == "adamw":
        optimizer = torch.optim.AdamW(params, lr=_RATE)
    else:
        safety = single_batches(bench.material.safety, 0, params[0].device)
        probe, refresh = SafetyProbe(model, safety), RefreshPolicy.fixed(_EVERY)
        optimizer = ProjectedAdamW(params, lr=_RATE, probe=probe, refresh=refresh)
    for batch in bench.task_batches(setting.memory_steps):
        optimizer.zero_grad()
        task_loss(model, batch).backward()
        optimizer.step()
    if isinstance(optimizer, ProjectedAdamW) and optimizer.safety.subspace is not None:
        basis = optimizer.safety.subspace.basis
        storage = {"kind": basis.kind, "directions": basis.rank, "nbytes": basis.nbytes}
    return {"peak_bytes": peak_bytes(), "steps": setting.memory_steps, "basis": storage}


def peak_bytes() -> int:
    """The largest memory that this process has had: on a GPU allocated there, else resident.

    Not ``ru_maxrss``, which on Linux a child process inherits from its parent.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


def main() -> None:
    """Measure one optimizer and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, required=True)
    parser.add_argument("--tiny", action="store_true", help="with the toy model")
    chosen = parser.parse_args()
    setting = SMALL if chosen.tiny else SMOLLM2
    print(json.dumps(peak_after_steps(setting, chosen.optimizer)))


if __name__ == "__main__":
    main()
