"""What a disk that runs full leaves of the files that are being written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, a text file gets its first half, then the error that the disk is full."""
    plain = Path.write_text

    def half(path: Path, text: str, **options) -> None:
        plain(path, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        yield


def assert_pages_survive(write, *pages: Path) -> None:
    """A report that cannot be written leaves the one before as it was."""
    before = [page.read_bytes() for page in pages]
    with full_disk(), pytest.raises(OSError, match="No space left"):
        write()
    assert [page.read_bytes() for page in pages] == before
