"""Run a function in several processes that form a gloo group."""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
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

_LIMIT = 240  # seconds; ten times what most sets take, where many share a processor


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
            _wait(workers, Path(folder))
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
        paths = [Path(folder, f"{rank}.pt") for rank in range(len(workers))]
        return [torch.load(path, weights_only=False) for path in paths]


def _wait(workers: list[Any], folder: Path) -> None:
    """Wait until all are done.

    Raises:
        AssertionError: if one has failed, which the others would wait for in vain, or they run into
            the limit; with what the failed one, or each, was doing.
    """
    end = time.monotonic() + _LIMIT
    while True:
        running = {w.sentinel: rank for rank, w in enumerate(workers) if w.is_alive()}
        if any(w.exitcode for w in workers):
            time.sleep(1)  # those that fail because another one died may be seen before it
            failed = {rank: w.exitcode for rank, w in enumerate(workers) if w.exitcode}
            raise AssertionError(f"exit codes by rank: {failed}\n" + _said(folder, failed))
        if not running:
            return
        if not multiprocessing.connection.wait(list(running), max(end - time.monotonic(), 0)):
            for rank in running.values():
                os.kill(workers[rank].pid, signal.SIGUSR1)
            time.sleep(1)  # while they write
            raise AssertionError(f"not done after {_LIMIT} s\n" + _said(folder, running.values()))


def _said(folder: Path, ranks: Iterable[int]) -> str:
    paths = {rank: folder / f"{rank}.txt" for rank in ranks}
    said = {rank: p.read_text() if p.exists() else "not begun" for rank, p in paths.items()}
    return "\n".join(f"rank {rank}: {text}" for rank, text in said.items())


def _work(
    rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    with Path(folder, f"{rank}.txt").open("w") as said:
        faulthandler.enable(said)
        faulthandler.register(signal.SIGUSR1, said)
        try:
            if ranks:
                _join(rank, ranks, folder)
            torch.save(function(*args), f"{folder}/{rank}.pt")
            if ranks:
                dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=said)
            raise
        finally:
            faulthandler.disable()
            faulthandler.unregister(signal.SIGUSR1)


def _one_thread() -> None:
    """Give every gloo group of this process one thread for its collectives instead of two.

    Both would write the name of what they have finished to one string without a lock (torch 2.13,
    ProcessGroupGloo::runLoop), which frees its memory twice where they do it at once: a process of
    these tests died of it. Names of 16 letters and more lie in such memory: DTensor's gathers'.
    """
    make = dist.ProcessGroupGloo.__init__

    def init(self: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
        options._threads = 1
        options._timeout = timeout
        make(self, store, rank, size, options)

    dist.ProcessGroupGloo.__init__ = init  # torch passes no options of ours on to it


def _join(rank: int, ranks: int, folder: str) -> None:
    # As torchrun tells them; Trainer and Accelerate ask for nothing else.
    names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for group, number in zip(names, (rank, ranks), strict=True):
        os.environ.update(dict.fromkeys(group, str(number)))
    _one_thread()
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
