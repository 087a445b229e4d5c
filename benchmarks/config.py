"""The config of a benchmark run: what is trained on what, by which methods, and how it is measured.

A config is a YAML file; `load_config` reads it and says exactly what is wrong with it. Its parts
are in `benchmarks.settings`, the entries of ``methods`` in `benchmarks.entries`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from benchmarks.entries import MethodConfig, problems, varied
from benchmarks.settings import (
    ALIGNED,
    TINY,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    Strict,
    TaskConfig,
)

__all__ = [
    "ALIGNED",
    "BASELINE",
    "CONFIGS",
    "TINY",
    "ConfigError",
    "EvaluationConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "RunConfig",
    "SweepConfig",
    "TaskConfig",
    "TuningConfig",
    "load_config",
]

CONFIGS = Path(__file__).parent / "configs"
BASELINE = "adamw"


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of version 1.2: to PyYAML ``1e-3``, without a point, is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class ConfigError(ValueError):
    """A config file that cannot be used, with every problem in it."""


class RunConfig(Strict):
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
        return [entry for method in methods for entry in varied(method)]

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


class TuningConfig(Strict):
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
                raise ValueError(f"{method.key}: {'; '.join(problems(error))}") from None
        keys = [point.key for method in self.methods for point in method.points()]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"methods: {', '.join(twice)}: the grids have this point twice")
        if len(set(self.tuning.seeds)) < len(self.tuning.seeds):
            raise ValueError(
                f"tuning.seeds={list(self.tuning.seeds)}: each seed may stand there once"
            )
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
        # Without the prompts' losses the leaderboard would have no intervals.
        fields["evaluation"] |= {"split": split, "per_prompt": True}
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
        lines = "\n".join(f"  {problem}" for problem in problems(error))
        raise ConfigError(f"{path}: this config cannot be used\n{lines}") from None


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file as plain data; the file that it ``extends`` gives what it does not say.

    ``above`` are the files that lead here.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends itself, by way of {above[-1].name}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
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
    whole = _read(path.parent / str(data.pop("extends")), (*above, path.resolve()))
    for name, value in data.items():
        known = whole.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            value = {**known, **value}
        whole[name] = value
    return whole
