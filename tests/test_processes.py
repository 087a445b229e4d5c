"""What the distributed tests do where a process fails, hangs or dies."""

from __future__ import annotations

import ctypes
import time

import processes
import pytest
import torch.distributed as dist


def _fail():
    dist.barrier()  # else rank 0 may still be connecting, and fail as well
    if dist.get_rank() == 1:
        raise ValueError("not this one")
    time.sleep(600)  # as a rank that waits for it


def _hang():
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def _die():
    dist.barrier()
    if dist.get_rank() == 1:
        ctypes.string_at(0)
    dist.barrier()


def test_a_failure_ends_all_and_is_shown():
    with pytest.raises(AssertionError, match=r"by rank: \{1: 1\}\n(.|\n)*not this one"):
        processes.run_ranks(2, _fail)


def test_a_hang_shows_what_each_rank_was_doing(monkeypatch):
    monkeypatch.setattr(processes, "_LIMIT", 5)
    with pytest.raises(AssertionError, match=r"not done after 5 s\nrank 0: (.|\n)* in barrier"):
        processes.run_ranks(2, _hang)


class _Unloadable:
    def __call__(self):
        pass

    def __reduce__(self):
        return _die_at_once, ()


def _die_at_once():
    raise ValueError("no rank can load it")


def test_a_process_that_does_not_begin_is_named():
    with pytest.raises(AssertionError, match=r"by rank: \{0: 1\}\nrank 0: not begun"):
        processes.run_ranks(0, _Unloadable())


def test_a_process_that_dies_is_named():
    with pytest.raises(AssertionError, match=r"1: -11(.|\n)*Segmentation fault"):
        processes.run_ranks(2, _die)
