"""The clock by which the time of passes is counted."""

from __future__ import annotations

from time import perf_counter

import torch


def clock() -> float:
    """Seconds of wall time, read when all work given to the current GPU is done.

    A GPU works behind the program: read without waiting, one part's time would be booked to the
    next part that needs a number on the host. Waiting costs little where a part ends with one.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()
