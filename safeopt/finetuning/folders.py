"""The folders of results: their names, and whether they can be written, asked before any work."""

from __future__ import annotations

import os
from pathlib import Path

RESULT = {False: "adapter", True: "model"}  # by whether all parameters were trained
CURVES = "curves.png"


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written to; make nothing.

    Args:
        out: where results shall be written; it need not exist.

    Raises:
        FileExistsError: if it, or one of the folders above it, is a file.
        PermissionError: if it must not be written to.
    """
    real = out.resolve()
    nearest = next(path for path in (real, *real.parents) if path.exists())
    if not nearest.is_dir():
        what = "it" if nearest == real else nearest
        raise FileExistsError(f"out={out}: {what} is a file; expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"out={out}: {nearest} is write-protected; choose another folder")
