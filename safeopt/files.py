"""Text files that are written whole or not at all, and the hash of a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20  # bytes


def write_whole(path: Path, text: str) -> Path:
    """Write a file in one step: a reader sees the old file or the new one, never a part.

    Args:
        path: the file; its folder exists.
        text: what it shall hold, written as UTF-8.

    Returns:
        The path.
    """
    working = path.with_name(path.name + ".partial")
    working.write_text(text, encoding="utf-8", newline="\n")
    return working.replace(path)


def sha256(path: Path) -> str:
    """The hash of a file, hexadecimal; it is read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def plain(choices: Any) -> dict[str, Any]:
    """A dataclass as data that JSON knows; paths become strings."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(choices).items()}


def write_json(path: Path, value: Any) -> Path:
    """Write plain data as JSON, see `write_whole`."""
    return write_whole(path, json.dumps(value, indent=1) + "\n")
