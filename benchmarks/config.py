"""The config of a benchmark run: what is trained on what, by which methods, and how it is measured.

A config is a YAML file; `load_config` reads it and says exactly what is wrong with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
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


class ConfigError(ValueError):
    """A config file that cannot be used, with every problem in it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Strict):
    """The model that is fine-tuned.

    Attributes:
        name: ``smollm2-aligned``, ``tiny``, or any hub name, local folder or GGUF file.
        dtype: of its parameters.
    """

    name: str
    dtype: Literal["float32", "bfloat16"] = "float32"


class TaskConfig(_Strict):
    """The harmless task.

    Attributes:
        name: ``codeio``, ``gsm8k``, ``summaries`` or ``tiny``.
        max_length: tokens at which an example is cut off.
        min_response_tokens: examples with a shorter response within the cut are left out.
        full_length: leave out examples shorter than ``max_length``, so that all batches are equal.
        eval_examples: held-out examples on which the task loss is measured.
    """

    name: Literal["codeio", "gsm8k", "summaries", "tiny"]
    max_length: PositiveInt = 128
    min_response_tokens: PositiveInt = 1
    full_length: bool = False
    eval_examples: PositiveInt = 8


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
    """

    every: PositiveInt = 4
    split: Literal["val", "test"] = "test"
    alignment_prompts: PositiveInt = 20
    refusal_prompts: PositiveInt = 64
    over_refusal_prompts: PositiveInt = 32
    new_tokens: PositiveInt = 9


class MethodConfig(BaseModel):
    """One method and its own options, which stand beside these.

    Attributes:
        name: as `benchmarks.methods.method_class` takes it.
        label: the name in the result; the same method may run twice under two labels.
        learning_rate: instead of the run's.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    label: str = ""
    learning_rate: PositiveFloat | None = None

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


def load_config(path: Path) -> RunConfig:
    """Read and validate a config file.

    Args:
        path: a YAML file.

    Raises:
        ConfigError: if the file cannot be read, is no YAML mapping, or does not fit `RunConfig`;
            the message has a line for each problem.
    """
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
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  {problem}" for problem in _problems(error))
        raise ConfigError(f"{path}: this config cannot be used\n{lines}") from None


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
