"""Other libraries' notes on loading are about their internals; warnings and errors come through."""

from __future__ import annotations

import logging
import warnings

from transformers.utils import logging as transformers_logging


def be_quiet() -> None:
    """Switch off what says nothing to the reader of a benchmark."""
    # It looks for a faster CPU kernel on the hub and warns that there is none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
