"""A diagnosis as files: ``aic.json`` for programs, ``report.html`` for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safeopt.diagnostics.diagnosis import Diagnosis

DATA = "aic.json"


def write_report(result: Diagnosis, folder: Path, config: dict[str, Any]) -> Path:
    """Write ``aic.json`` into a folder, which is made if need be.

    Args:
        result: the diagnosis.
        folder: where to write.
        config: what was diagnosed, kept in the file as it is.

    Returns:
        The path of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / DATA
    working = path.with_name(path.name + ".partial")
    text = json.dumps({"config": config, **result.as_json()}, indent=1)
    working.write_text(text + "\n", encoding="utf-8")
    return working.replace(path)
