"""The oldest versions of other libraries that the integrations were tested with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

# Found by running the integration tests beside the pinned torch, see docs/reference/versions.md.
OLDEST: Mapping[str, str] = {
    "transformers": "4.51",
    "accelerate": "1.1",
    "peft": "0.14",
    "trl": "0.16",
    "lightning": "2.4",
    "bitsandbytes": "0.46",
    "deepspeed": "0.16",
}


def require(*names: str) -> None:
    """Refuse libraries that are missing or too old, before they fail somewhere inside.

    Args:
        *names: keys of `OLDEST`.

    Raises:
        ImportError: naming the library, the version found and the one that is needed.
    """
    for name in names:
        oldest = OLDEST[name]
        try:
            found = version(name)
        except PackageNotFoundError:
            raise ImportError(
                f"{name} is not installed; this integration needs it: "
                f'pip install "{name}>={oldest}"'
            ) from None
        if _release(found) < _release(oldest):
            raise ImportError(
                f"{name} {found} is too old for this integration, which needs {oldest} or newer: "
                f'pip install --upgrade "{name}>={oldest}"'
            )


def _release(text: str) -> tuple[int, int]:
    """Major and minor number; what follows never decides."""
    major, minor = (*text.split("."), "0")[:2]
    return int(major), int(minor)
