"""Other libraries' notes on loading are about their internals; warnings and errors come through."""

from __future__ import annotations

import warnings

from transformers.utils import logging as transformers_logging


def be_quiet() -> None:
    """Switch off what says nothing to the reader of a benchmark."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
