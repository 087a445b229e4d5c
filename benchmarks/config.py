"""The config of a benchmark run: what is trained on what, by which methods, and how it is measured.

A config is a YAML file; `load_config` reads it and says exactly what is wrong with it.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from benchmarks.methods import method_class

CONFIGS = Path(__file__).parent / "configs"
TINY = "tiny"
ALIGNED = "smollm2-aligned"
BUILT_IN = ("codeio", "gsm8k", "summaries", "tiny")
BASELINE = "adamw"


class ConfigError(ValueError):
    """A config file that cannot be used, with every problem in it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Strict):
    """The model that is fine-tuned.

    Attributes:
        name: ``smollm2-aligned``, ``tiny``, or any hub name, local folder or GGUF file.
        dtype: of its parameters.
        unaligned: the same for the model from before its alignment, which Safe LoRA needs. The two
            built-in models have one.
        architecture: one of `safeopt.plan.architectures`, for a dry run.
        dry: a model of the same architecture, but tiny and with random weights, stands in for it.
    """

    name: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    unaligned: str | None = None
    architecture: str | None = None
    dry: bool = False


class TaskConfig(_Strict):
    """The harmless task.

    Attributes:
        name: ``codeio``, ``gsm8k``, ``summaries``, ``tiny``, a file of JSON lines, or a data set on
            the hub.
        subset: of a data set on the hub.
        split: likewise.
        prompt: column of the prompts; without it a row has one of the forms of `safeopt.data`.
        response: column of the responses.
        instruction: stands before every prompt of the column.
        max_length: tokens at which an example is cut off.
        min_response_tokens: examples with a shorter response within the cut are left out.
        full_length: leave out examples shorter than ``max_length``, so that all batches are equal.
        eval_examples: held-out examples on which the task loss is measured.
        val_examples: others, on which it is measured with the split ``val``; 0 for the same.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    prompt: str | None = None
    response: str | None = None
    instruction: str = ""
    max_length: PositiveInt = 128
    min_response_tokens: PositiveInt = 1
    full_length: bool = False
    eval_examples: PositiveInt = 8
    val_examples: NonNegativeInt = 0

    @field_validator("name")
    @classmethod
    def _has_a_source(cls, name: str) -> str:
        if name not in BUILT_IN and "/" not in name and not name.endswith(".jsonl"):
            raise ValueError(
                f"expected {', '.join(BUILT_IN)}, a file of JSON lines (.jsonl), or owner/name on "
                "the hub"
            )
        return name

    @model_validator(mode="after")
    def _columns(self) -> TaskConfig:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response: name both columns or neither")
        if self.name in BUILT_IN and (self.prompt or self.subset or self.instruction):
            raise ValueError(
                "prompt, response, subset and instruction are for other data than "
                f"{', '.join(BUILT_IN)}"
            )
        return self


class LoraConfig(_Strict):
    """Low-rank adapters, as in PEFT."""

    r: PositiveInt = 8
    alpha: PositiveInt = 16
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)


class EvaluationConfig(_Strict):
    """How a run is measured.

    Attributes:
        every: steps between two points of the curve.
        split: HarmBench's ``val`` for choosing hyperparameters, ``test`` for published figures.
        alignment_prompts: harmful prompts on which the alignment loss is measured.
        refusal_prompts: harmful prompts that are answered at the start and the end.
        over_refusal_prompts: harmless prompts that look harmful, likewise.
        new_tokens: length of an answer; a refusal shows in its first words.
        harmless_kl: measure KL(π_θ₀ ‖ π_θ) on the aligned model's answers to the harmless prompts.
        per_prompt: keep the alignment loss of each prompt, for intervals.
        metric_examples: held-out task examples that are answered for the task's metric; 0 for none.
        metric_tokens: length of such an answer.
    """

    every: PositiveInt = 4
    split: Literal["val", "test"] = "test"
    alignment_prompts: PositiveInt = 20
    refusal_prompts: PositiveInt = 64
    over_refusal_prompts: PositiveInt = 32
    new_tokens: PositiveInt = 9
    harmless_kl: bool = False
    per_prompt: bool = False
    metric_examples: NonNegativeInt = 0
    metric_tokens: PositiveInt = 64


class MethodConfig(BaseModel):
    """One method and its own options, which stand beside these.

    Attributes:
        name: as `benchmarks.methods.method_class` takes it.
        label: the name in the result; the same method may run twice under two labels.
        learning_rate: instead of the run's.
        group: what this entry is a variant of, in reports.
        vary: options, each with the values that it takes while all others stay as they are: one
            entry for each value (an ablation).
        grid: options (and ``learning_rate``), each with the values to try, in every combination;
            only in a sweep.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    label: str = ""
    learning_rate: PositiveFloat | None = None
    group: str = ""
    grid: dict[str, tuple[Any, ...]] = {}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        method_class(name)
        return name

    @model_validator(mode="after")
    def _valid_options(self) -> MethodConfig:
        try:
            self.options()
        except ValidationError as error:
            raise ValueError("; ".join(_problems(error))) from None
        return self

    def options(self) -> BaseModel:
        """The options that stand beside the name, as the method's own model."""
        return method_class(self.name).Options.model_validate(self.model_extra or {})

    @property
    def key(self) -> str:
        """The name under which the result lists this method."""
        return self.label or self.name

    @property
    def family(self) -> str:
        """The name under which reports gather the variants of an entry."""
        return self.group or self.key

    def points(self) -> tuple[MethodConfig, ...]:
        """One entry for each combination of the grid's values, in its order."""
        return tuple(
            self._with(dict(zip(self.grid, values, strict=True)))
            for values in product(*self.grid.values())
        )

    def _with(self, changes: dict[str, Any]) -> MethodConfig:
        fields = self.model_dump(exclude={"grid"})
        label = f"{self.key}[{_shown(changes)}]" if changes else self.key
        return MethodConfig.model_validate(
            {**fields, **changes, "label": label, "group": self.family}
        )


def _shown(changes: dict[str, Any]) -> str:
    """Options and values for a label: ``rank=8,mode=damp``."""
    return ",".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={json.dumps(value)}"
        for name, value in changes.items()
    ).replace('"', "")


def _varied(entry: Any) -> list[Any]:
    """The entries that ``vary`` stands for."""
    if not isinstance(entry, dict) or "vary" not in entry:
        return [entry]
    plain = {key: value for key, value in entry.items() if key != "vary"}
    if not isinstance(entry["vary"], dict):
        raise ValueError("vary: expected options, each with a list of values")
    entries = []
    for name, values in entry["vary"].items():
        if not isinstance(values, list):
            raise ValueError(f"vary.{name}: expected a list of values")
        for value in values:
            label = _shown({name: value})
            # The group is the option: one panel of the ablation plots.
            entries.append({**plain, name: value, "label": label, "group": name})
    return entries


class RunConfig(_Strict):
    """A comparison: every method with every seed, on equal data and steps.

    Attributes:
        lora: None to train all parameters.
        threads: processor threads; torch's choice by default. The tiny model is fastest with one,
            and digits depend on the number.
    """

    model: ModelConfig
    task: TaskConfig
    batch_size: PositiveInt = 4
    steps: PositiveInt
    learning_rate: PositiveFloat
    lora: LoraConfig | None = None
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    evaluation: EvaluationConfig = EvaluationConfig()
    threads: PositiveInt | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _expanded(cls, methods: Any) -> Any:
        if not isinstance(methods, list):
            return methods
        return [entry for method in methods for entry in _varied(method)]

    @model_validator(mode="after")
    def _no_grid(self) -> RunConfig:
        if type(self) is RunConfig and (gridded := [m.key for m in self.methods if m.grid]):
            raise ValueError(
                f"methods: {', '.join(gridded)}: a grid needs a sweep; add `tuning:` and run it "
                "with `python -m benchmarks sweep`"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        keys = [method.key for method in self.methods]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"methods: {', '.join(twice)}: listed twice; give each its own label")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: each seed may stand there once")
        if (self.model.name == TINY) != (self.task.name == TINY):
            raise ValueError(
                f"model {self.model.name!r} with task {self.task.name!r}: the model 'tiny' knows "
                "only the words of the task 'tiny'; use both or neither"
            )
        return self

    def as_json(self) -> dict[str, Any]:
        """The config as plain data, to be stored with the result."""
        return self.model_dump(mode="json")


class TuningConfig(_Strict):
    """How a sweep chooses among a method's grid points, on the split ``val``.

    Attributes:
        seeds: with which every grid point runs.
        tolerance: a point is eligible if its task loss is at most this share above the best of the
            baseline's; of those the one with the lowest alignment loss is chosen.
        points: how many points of a method's frontier are published: the chosen one and its
            nearest neighbours.
    """

    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    tolerance: float = Field(default=0.01, ge=0)
    points: PositiveInt = 2


class SweepConfig(RunConfig):
    """A comparison in which every method is tuned: on ``val``; published on ``test``.

    Attributes:
        tuning: how grid points are chosen.
        long: also run every method's choice for this many times the steps; None to leave it out.
    """

    tuning: TuningConfig
    long: PositiveInt | None = None

    @model_validator(mode="after")
    def _can_be_tuned(self) -> SweepConfig:
        if self.evaluation.split != "test":
            raise ValueError('evaluation.split: a sweep chooses on "val" itself; leave it out')
        if self.task.val_examples == 0:
            raise ValueError("task.val_examples=0: the choice needs held-out examples of its own")
        if BASELINE not in [method.key for method in self.methods]:
            raise ValueError(
                f"methods: a sweep needs {BASELINE}, which sets the task loss to match"
            )
        for method in self.methods:
            try:
                method.points()
            except ValidationError as error:
                raise ValueError(f"{method.key}: {'; '.join(_problems(error))}") from None
        return self

    def stage(
        self,
        split: Literal["val", "test"],
        methods: tuple[MethodConfig, ...],
        seeds: tuple[int, ...],
        times: int = 1,
    ) -> RunConfig:
        """The plain runs of one stage; ``times`` multiplies the steps."""
        fields = self.model_dump(exclude={"tuning", "long", "methods"})
        fields["evaluation"]["split"] = split
        fields["steps"] *= times
        fields["evaluation"]["every"] *= times
        plain = RunConfig.model_validate({**fields, "seeds": seeds, "methods": list(methods)})
        return plain


def load_config(path: Path) -> RunConfig:
    """Read and validate a config file.

    Args:
        path: a YAML file. With ``extends: OTHER`` it is laid over another one, section by section.

    Returns:
        A `SweepConfig` if the file has ``tuning``.

    Raises:
        ConfigError: if the file cannot be read, is no YAML mapping, or does not fit `RunConfig`;
            the message has a line for each problem.
    """
    data = _read(path)
    try:
        return (SweepConfig if "tuning" in data else RunConfig).model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  {problem}" for problem in _problems(error))
        raise ConfigError(f"{path}: this config cannot be used\n{lines}") from None


def _read(path: Path) -> dict[str, Any]:
    """A config file as plain data; the file that it ``extends`` gives what it does not say."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected a mapping with model, task, steps, learning_rate and methods, "
            f"found {'nothing' if data is None else type(data).__name__}"
        )
    if "extends" not in data:
        return data
    whole = _read(path.parent / str(data.pop("extends")))
    for name, value in data.items():
        known = whole.get(name)
        both = isinstance(value, dict) and isinstance(known, dict)
        whole[name] = {**known, **value} if both else value
    return whole


def _problems(error: ValidationError) -> list[str]:
    """One line for each problem: where it is, what was given, what is wrong."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = "no such setting; check the spelling"
        elif problem["type"] != "missing" and not isinstance(problem["input"], dict):
            where += f"={problem['input']!r}" if where else ""
        lines.append(f"{where}: {what}" if where else what)
    return lines
