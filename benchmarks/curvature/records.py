"""What the curvature benchmark measures, as it is written to ``result.json`` and ``details.json``.

``result.json`` holds the figures alone. ``details.json`` says where and with what they were made,
and holds what has no place among them: model calls, what was left out and why, peak memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.config import ConfigError
from benchmarks.records import FILE
from safeopt.files import write_whole

DETAILS = "details.json"


class Row(BaseModel):
    """Strict: a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class EigenpairsRow(Row):
    """One run for the top eigenpairs of one operator.

    Attributes:
        start: ``warm`` where an earlier basis was given.
        seconds: wall time, the operator's construction included.
        products: matrix-vector products.
        max_residual: largest ‖Hu − λu‖/|λ| of the wanted pairs, computed for every implementation
            by the same operator after the run.
        peak_bytes: peak memory above what was in use before the run: what the process holds, or of
            a GPU what is allocated there.
    """

    implementation: str
    operator: Literal["hessian", "ggn"]
    start: Literal["cold", "warm"]
    seconds: float
    products: int
    max_residual: float
    peak_bytes: int


class GramRow(Row):
    """Per-example gradients, their Gram matrix and the basis; means over a few repeats.

    Attributes:
        one_pass_seconds: from one forward and one backward pass of the batch.
        loop_seconds: the same from a pass for each example.
        forward_backward_seconds: ``model(**batch).loss.backward()`` on the same examples.
    """

    one_pass_seconds: float
    loop_seconds: float
    forward_backward_seconds: float


class BasisRow(Row):
    """One kind of storage.

    Attributes:
        nbytes: of the basis.
        dense_fp32_nbytes: of k directions over the same parameters in float32.
        projection_error: ‖P̃v − Pv‖/‖Pv‖ for the gradient v of the task, P made without the basis.
    """

    kind: str
    nbytes: int
    dense_fp32_nbytes: int
    projection_error: float


class AicRow(Row):
    """The three figures of the alignment instability condition.

    Attributes:
        parameters: over how many.
    """

    implementation: str
    seconds: float
    parameters: int


class CurvatureResult(Row):
    """``result.json``."""

    eigenpairs: list[EigenpairsRow] = Field(default_factory=list)
    gram: GramRow | None = None
    basis: list[BasisRow] = Field(default_factory=list)
    aic: list[AicRow] = Field(default_factory=list)


class Origin(Row):
    """Of which commit a part is, and on which processor it ran."""

    commit: str | None
    processor: str


class Details(Row):
    """``details.json``.

    Attributes:
        setting: what was run.
        environment: versions, processor and threads of the call that finished the run.
        origins: where each part comes from, which may be an earlier call's.
        peers: versions of the peers; None for those that are not installed.
        parts: what each part measured besides its rows.
        skipped: parts that did not run, and why.
    """

    setting: dict[str, Any]
    environment: dict[str, Any]
    peers: dict[str, str | None]
    origins: dict[str, Origin] = Field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    skipped: dict[str, str] = Field(default_factory=dict)


def write(record: BaseModel, path: Path) -> None:
    """Write a record in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, record.model_dump_json(indent=1) + "\n")


def read(folder: Path) -> tuple[CurvatureResult, Details]:
    """The result in a folder.

    Raises:
        ConfigError: if there is none, or a file is damaged.
    """
    try:
        result = (folder / FILE).read_text(encoding="utf-8")
        details = (folder / DETAILS).read_text(encoding="utf-8")
        return CurvatureResult.model_validate_json(result), Details.model_validate_json(details)
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{folder}: no finished result of the curvature benchmark; make one with "
            f"`python -m benchmarks curvature --out {folder}` ({error})"
        ) from error
