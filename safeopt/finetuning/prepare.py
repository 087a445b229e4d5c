"""Everything that can go wrong before training does so here, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safeopt.files import sha256
from safeopt.finetuning.checkpoints import last_checkpoint, written_folders
from safeopt.finetuning.config import ADAMW, FinetuneConfig
from safeopt.finetuning.folders import CURVES, check_folder
from safeopt.finetuning.inputs import Inputs, load_inputs
from safeopt.finetuning.report import REPORT, read_report
from safeopt.optim import optimizers
from safeopt.optim.config import SafetyConfig
from safeopt.probe import OPENING, SafetyProbe

# What a resumed run may change; a checkpoint silently overrules some of the rest.
_FREE_TO_CHANGE = {"out", "resume", "overwrite"}
_FREE_TO_CHANGE |= {"epochs", "max_steps", "save_steps", "logging_steps"}

# What is the user's own, where it is a path.
_DATA = ("train", "safety", "harmless", "chat_template")
_OWN = ("model", *_DATA)


@dataclass
class Prepared:
    """A run that is ready to start.

    Attributes:
        config: its choices.
        inputs: the model with its adapter, the data and the safety examples.
        optimizer: protected unless the config says ``"adamw"``.
        checkpoint: folder to resume from, or None.
        data: SHA-256 of the data's files, by argument.
    """

    config: FinetuneConfig
    inputs: Inputs
    optimizer: torch.optim.Optimizer
    checkpoint: str | None
    data: dict[str, str]


def prepare(config: FinetuneConfig) -> Prepared:
    """Read and check everything; write nothing.

    Raises:
        FileNotFoundError: if a file or a checkpoint is missing.
        FileExistsError: if ``out`` is a file, or holds a run and neither ``resume`` nor
            ``overwrite`` is set.
        PermissionError: if ``out`` must not be written to.
        ValueError: if several processes were started, the model or a file of the data is where the
            run writes, a file is malformed or a checkpoint damaged, the model has no chat template,
            or there is nothing to protect since the model does not refuse the safety prompts, or
            too few of them.
    """
    check_folder(Path(config.out))
    _check_apart(config)
    data = _digests(config)
    checkpoint = _checkpoint(config, data)
    # A protected run keeps its trial examples apart, and needs one beside them.
    at_least = 1 if config.optimizer == ADAMW else SafetyConfig.trial_examples + 1
    inputs = load_inputs(config, at_least=at_least, opening=OPENING)
    optimizer = _optimizer(inputs.model, inputs.probe, config)
    return Prepared(config, inputs, optimizer, checkpoint, data)


def _digests(config: FinetuneConfig) -> dict[str, str]:
    """SHA-256 of the data's files; one that is not there is named where it is read."""
    files = {name: getattr(config, name) for name in _DATA}
    return {
        name: sha256(Path(file))
        for name, file in files.items()
        if file is not None and Path(file).is_file()
    }


def _checkpoint(config: FinetuneConfig, data: dict[str, str]) -> str | None:
    out = Path(config.out)
    if config.resume:
        last = last_checkpoint(out)
        _check_unchanged(config, data, out / REPORT)
        return str(last)
    found = [
        path.name
        for path in (out / REPORT, *written_folders(out))
        if path.exists() or path.is_symlink()
    ]
    if found and not config.overwrite:
        raise FileExistsError(
            f"out={out}: it holds a run already ({', '.join(found)}); continue it with --resume, "
            "or start again with --overwrite, which removes that"
        )
    return None


def _check_apart(config: FinetuneConfig) -> None:
    """Refuse what is the user's own where the run writes, replaces or removes."""
    out = Path(config.out)
    written = (*written_folders(out), out / REPORT, out / CURVES)
    for name in _OWN:
        value = getattr(config, name)
        if value is None or not Path(value).exists():  # a model's hub name, or named as missing
            continue
        for place in written:
            relation = _relation(Path(value), place)
            if relation:
                raise ValueError(
                    f"{name}={value}: it {relation} {place}, which the run writes, replaces or "
                    f"removes; choose another folder with --out, or move the {name} elsewhere"
                )


def _relation(path: Path, folder: Path) -> str | None:
    """How a path lies in a folder, links followed; None where it does not."""
    written, real, folder = path.absolute(), path.resolve(), folder.resolve()
    if real == folder:
        return "is"
    # A link in the folder would be lost although what it leads to lies elsewhere.
    inside = folder in real.parents or any(above.resolve() == folder for above in written.parents)
    return "lies in" if inside else None


def _check_unchanged(config: FinetuneConfig, data: dict[str, str], report: Path) -> None:
    """Refuse to resume a run with other choices or data than it was started with."""
    if not report.is_file():
        raise FileNotFoundError(
            f"resume: there is no {report}, which says what was started; start again with "
            "--overwrite"
        )
    written = read_report(report)
    before, had = written["config"], written.get("data", {})  # new: earlier runs have none
    for name, value in config.as_dict().items():
        was = before.get(name, value)
        if name not in _FREE_TO_CHANGE and value != was and not _has_moved(name, was, value):
            raise ValueError(
                f"resume: the run in {config.out} was started with {name}={was}, now it is "
                f"{value}; give the same, or start again with --overwrite"
            )
    for name, digest in data.items():
        if had.get(name, digest) != digest:
            raise ValueError(
                f"resume: {name}={getattr(config, name)} has changed since the run in {config.out} "
                "was started; give the file as it was, or start again with --overwrite"
            )


def _has_moved(name: str, was: Any, value: Any) -> bool:
    """Whether a path leads to what the earlier one led to, whose folder was moved or renamed.

    What lies in it has kept its name. That says enough of a file of the data, whose hash is
    compared, but not of a model: hub names end alike, and so do folders of different models.
    """
    if name not in _OWN or not (isinstance(was, str) and isinstance(value, str)):
        return False
    before, now = Path(was), Path(value)
    if before.name != now.name:
        return False
    gone = not before.exists() or before.resolve() == now.resolve()
    return name in _DATA or (now.exists() and gone)


def _optimizer(model: Any, probe: SafetyProbe, config: FinetuneConfig) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    choices: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == ADAMW:
        return torch.optim.AdamW(params, **choices)
    cls: Any = optimizers()[config.optimizer].cls
    return cls(
        params, **choices, probe=probe, rank=config.rank, budget=config.budget,
        elastic=config.elastic, seed=config.seed,
    )  # fmt: skip
