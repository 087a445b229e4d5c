"""Run a function in several processes that form a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# One server imports the libraries; every process is forked from it, before any thread has started.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
        "safeopt",
        "safeopt.integrations.trainer",
    ]
)


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` in ``ranks`` processes; what each returned, by rank.

    ``ranks=0``: one process without a group.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            _CONTEXT.Process(target=_work, args=(rank, ranks, folder, function, args))
            for rank in range(max(ranks, 1))
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(500)  # most of it waiting, where many share a processor
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
        results = []
        for rank in range(len(workers)):
            failed = Path(folder, f"{rank}.txt")
            assert not failed.exists(), f"rank {rank}: {failed.read_text()}"
            results.append(torch.load(Path(folder, f"{rank}.pt"), weights_only=False))
    return results


def _work(
    rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        if ranks:
            # As torchrun tells them; Trainer and Accelerate ask for nothing else.
            names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
            for group, number in zip(names, (rank, ranks), strict=True):
                os.environ.update(dict.fromkeys(group, str(number)))
            store = dist.FileStore(f"{folder}/store", ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        torch.save(function(*args), f"{folder}/{rank}.pt")
        if ranks:
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise
