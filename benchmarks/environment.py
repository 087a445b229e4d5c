"""Where a run took place, and how much memory it took."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

import safeopt

PACKAGES = ("safeopt-torch", "torch", "transformers", "peft")
INTERVAL = 0.05
# Folders of the code and the prompts that a run is made of, and the names of their files there.
CHECKOUT = (Path(__file__).parent, Path(safeopt.__file__).parent)
SOURCES = ("*.py", "*.txt")


def environment(threads: int | None = None) -> dict[str, Any]:
    """Versions, processor and threads: what a reader needs to compare seconds and digits.

    Args:
        threads: of a run, where they are not those of this process.
    """
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def sources(others: Iterable[Path] = ()) -> str:
    """SHA-256 of this benchmark's and the package's code and prompts, committed or not.

    Args:
        others: files of methods that may lie elsewhere.
    """
    digest = hashlib.sha256()
    for folder in CHECKOUT:
        for path in sorted(path for names in SOURCES for path in folder.rglob(names)):
            digest.update(f"{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes())
    for path in sorted({path.resolve() for path in others}):
        digest.update(b"\0" + path.read_bytes())
    return digest.hexdigest()


class PeakMemory:
    """The peak memory of this process while the block runs, in ``bytes`` afterwards."""

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(INTERVAL):
                return


def _commit() -> str | None:
    """The commit of this checkout, with a + if files differ from it; None outside of git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "-uno") else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; Python itself leaves it empty on Linux."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
