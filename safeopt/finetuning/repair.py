"""`safeopt repair` as a library: load, check, repair, and write whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safeopt.data import encode_all, read_examples
from safeopt.files import plain, write_json
from safeopt.finetuning.adapter import load_adapter
from safeopt.finetuning.folders import RESULT, check_folder
from safeopt.finetuning.inputs import check_one_process, check_seed, read_template
from safeopt.integrations.bitsandbytes import keep_trainable
from safeopt.models import check_readable, check_trainable, load_causal_lm
from safeopt.optim.repair import RepairReport, repair
from safeopt.probe import SafetyProbe
from safeopt.safety_examples import check_batches, check_enough, check_likely, read_safety_batches

REPORT = "repair.json"
_WORKING = "repair.partial"
_TRIAL_EXAMPLES = 8  # safety examples that only judge the steps


@dataclass(frozen=True)
class RepairConfig:
    """What `safeopt repair` is told.

    Args:
        model: the fine-tuned model: the folder of an adapter, or a folder, hub name or GGUF file
            of a whole model.
        reference: the aligned model that it was fine-tuned from. It gives the alignment loss to
            return to and, where a prompt has no response, the refusal. An adapter is put onto it.
        safety: JSON lines with harmful prompts.
        out: folder for the repaired adapter or model and `repair.json`; new or empty.
        train: JSON lines of what was learned, to keep it; None repairs without looking at it.
        harmless: JSON lines with harmless prompts that must not be refused; None for none.
        budget: accepted rise of the alignment loss over the reference's, in nats a token.
        refreshes: steps of the repair, at most.
        examples: safety examples (and held ones, and task examples) for each.
        max_length: tokens after which a task example is cut.
        seed: of the order of the examples.
        chat_template: file with a Jinja chat template, instead of the tokenizers' own.

    Raises:
        ValueError: naming the argument that is out of its range.
    """

    model: str
    reference: str
    safety: Path
    out: Path
    train: Path | None = None
    harmless: Path | None = None
    budget: float = 0.01
    refreshes: int = 5
    examples: int = 32
    max_length: int = 1024
    seed: int = 0
    chat_template: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("refreshes", 1), ("examples", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if not self.budget >= 0:
            raise ValueError(f"budget={self.budget}: expected at least 0")
        check_seed(self.seed)

    def as_dict(self) -> dict[str, Any]:
        """Return the choices as plain values; paths become strings."""
        return plain(self)


@dataclass
class PreparedRepair:
    """A repair that is ready to start.

    Attributes:
        config: its choices.
        model: the fine-tuned model; what is to be repaired is trainable.
        tokenizer: what is saved with a whole model.
        probe: the safety examples, with the aligned model's refusals.
        task: batches of what was learned.
        reference: the aligned model's losses on all examples, see `safeopt.repair`.
        is_adapter: whether an adapter is repaired.
    """

    config: RepairConfig
    model: Any
    tokenizer: Any
    probe: SafetyProbe
    task: list[dict[str, torch.Tensor]]
    reference: torch.Tensor
    is_adapter: bool


def prepare_repair(config: RepairConfig) -> PreparedRepair:
    """Read and check everything; write nothing.

    Raises:
        FileNotFoundError: if a file is missing.
        FileExistsError: if ``out`` is a file or a folder that is not empty, saying where an earlier
            repair has left something in it.
        PermissionError: if ``out`` must not be written to.
        ValueError: if several processes were started, a file is malformed, a model cannot be
            loaded or cannot read an example, or the reference does not refuse the safety prompts,
            or too few of them, or would not say their responses.
    """
    check_one_process()
    _check_new(Path(config.out))
    examples = read_examples(config.train) if config.train else []
    is_adapter = (Path(config.model) / "adapter_config.json").is_file()
    template = None if config.chat_template is None else read_template(config.chat_template)
    aligned, tokenizer = load_causal_lm(config.reference, argument="reference")
    keep_trainable(aligned)  # before it answers the prompts
    if template is not None:
        tokenizer.chat_template = template
    if torch.cuda.is_available():
        aligned = aligned.cuda()
    safety, held = read_safety_batches(aligned, tokenizer, config.safety, config.harmless)
    check_enough(len(safety), _TRIAL_EXAMPLES + 1, str(config.safety))
    looked_at = SafetyProbe(aligned, safety, held=held)
    check_likely(looked_at, str(config.safety))
    reference = looked_at.values(looked_at.indices)
    if is_adapter:
        model = load_adapter(aligned, config.model, "model", trainable=True)
    else:
        device = aligned.device
        del aligned, looked_at
        model, own = load_causal_lm(config.model)
        check_trainable(model, f"model={config.model}")
        if template is not None or not own.chat_template:
            own.chat_template = tokenizer.chat_template
        model, tokenizer = model.to(device).requires_grad_(True), own
    task = encode_all(tokenizer, examples, config.max_length)
    if config.train and len(task) < 2:
        raise ValueError(
            f"train: {len(task)} responses of {config.train} fit into "
            f"max_length={config.max_length}; at least 2 are needed"
        )
    check_batches(model, [*safety, *held], f"model={config.model}: a prompt with its refusal")
    check_readable(
        model, [row["input_ids"] for row in task], f"train: an example in {config.train}"
    )
    return PreparedRepair(
        config,
        model,
        tokenizer,
        SafetyProbe(model, safety, held=held),
        [{name: torch.tensor([ids], device="cpu") for name, ids in row.items()} for row in task],
        reference,
        is_adapter,
    )


def _check_new(out: Path) -> None:
    """Refuse a folder that holds something, saying what an earlier repair has left in it."""
    left = out / _WORKING
    if left.is_dir() and not (out / REPORT).exists():
        # Not removed: the repair may be running, and a whole result may have cost hours.
        if (left / REPORT).is_file():
            what = f"the result of a repair that was not moved to its place; move it to {out}"
        else:
            what = "that of a repair that still runs or was killed; remove it if none runs"
        raise FileExistsError(f"out={out}: {left} is {what}, or choose another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out={out}: it exists already; expected a new or empty folder")
    check_folder(out)


def run_repair(prepared: PreparedRepair) -> RepairReport:
    """Repair and write ``out``: the adapter or model, and `repair.json`, which comes last.

    Raises:
        FloatingPointError: if a loss is not finite; nothing is written then.
        OSError: if ``out`` cannot be written to. Where the result was whole by then, the error
            says in which folder it is kept.
    """
    config = prepared.config
    with _whole(Path(config.out)) as working:
        report = repair(
            prepared.model,
            prepared.probe,
            budget=config.budget,
            reference=prepared.reference,
            task=prepared.task,
            refreshes=config.refreshes,
            examples=config.examples,
            trial_examples=_TRIAL_EXAMPLES,
            task_examples=config.examples,
            seed=config.seed,
        )
        folder = working / RESULT[not prepared.is_adapter]
        prepared.model.save_pretrained(folder)
        if not prepared.is_adapter:
            prepared.tokenizer.save_pretrained(folder)
        write_json(working / REPORT, {"config": config.as_dict(), **report.as_dict()})
    return report


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write to: what it holds at the end comes into ``out``, after an error nothing.

    It lies inside ``out``, so that the last move stays on one disk and needs no right to write
    beside it, and it is made at once, so that what is impossible fails before the work.
    """
    real = out.resolve()  # a link and "." stay what they are
    new = not real.exists()
    working = real / _WORKING
    working.mkdir(parents=True)
    try:
        yield working
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        if new and not any(real.iterdir()):
            real.rmdir()
        raise
    try:
        for path in sorted(working.iterdir(), key=lambda path: path.name == REPORT):
            path.replace(real / path.name)
        working.rmdir()
    except OSError as error:
        raise OSError(
            f"out={out}: the result could not be moved there ({error}); what is missing is kept "
            f"in {working}"
        ) from error
