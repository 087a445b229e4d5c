"""An entry of a config's ``methods``: one method, or several that differ in an option."""

from __future__ import annotations

import inspect
import json
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from benchmarks.methods import method_class


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
            raise ValueError("; ".join(problems(error))) from None
        return self

    def options(self) -> BaseModel:
        """The options that stand beside the name, as the method's own model."""
        return method_class(self.name).Options.model_validate(self.model_extra or {})

    def source(self) -> Path:
        """The file of the method's class."""
        return Path(inspect.getfile(method_class(self.name)))

    def given_harmless(self) -> bool:
        """Whether the method also looks at harmless prompts, which others do without."""
        options = self.options()
        return bool(getattr(options, "held", False) or getattr(options, "answers", 0))

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


def varied(entry: Any) -> list[Any]:
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


def problems(error: ValidationError) -> list[str]:
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
