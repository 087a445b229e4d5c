"""What the distributed tests do where a process fails, hangs or dies."""

from __future__ import annotations

import ctypes
import time

import processes
import pytest
import torch.distributed as dist


def _fail(path):
    if dist.get_rank() == 1:
        raise ValueError("not this one")
    time.sleep(600)  # as a rank that waits for it


def _hang(path):
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def _die_once(path):
    first = not (path / str(dist.get_rank())).exists()
    (path / str(dist.get_rank())).touch()
    dist.barrier()
    if first and dist.get_rank() == 1:
        ctypes.string_at(0)
    dist.barrier()
    return dist.get_rank()


def test_a_failure_ends_all_and_is_shown(tmp_path):
    with pytest.raises(AssertionError, match=r"by rank: \{1: 1\}\n(.|\n)*not this one"):
        processes.run_ranks(2, _fail, tmp_path)


def test_a_hang_shows_what_each_rank_was_doing(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_LIMIT", 5)
    with pytest.raises(AssertionError, match=r"not done after 5 s\nrank 0: (.|\n)* in barrier"):
        processes.run_ranks(2, _hang, tmp_path)


def test_a_process_that_dies_is_given_a_second_chance(tmp_path):
    with pytest.warns(UserWarning, match=r"a process died .* -11"):
        assert processes.run_ranks(2, _die_once, tmp_path) == [0, 1]
