"""The suite runs on the processor, also where there is a GPU; exactly ``-m gpu`` is for that."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs: numbers and ranks of the tests are those of a CPU, the same on every machine."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
