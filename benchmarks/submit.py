"""Checks of what others send in: a sweep's results, or a method of their own.

A result passes if it could have been made by this benchmark from a published config: the same
model, task, steps and prompts; AdamW beside the new method; every seed; choices that follow from
the runs on ``val``; numbers that agree with each other. What cannot be seen in a file, such as
whether ``test`` was looked at before, the guide asks for (docs/benchmarks/submit.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.config import (
    BASELINE,
    CONFIGS,
    ConfigError,
    EvaluationConfig,
    MethodConfig,
    RunConfig,
    SweepConfig,
    load_config,
)
from benchmarks.methods import method_class
from benchmarks.records import FILE, Record, Result, Start, read_result
from benchmarks.separation import separation
from benchmarks.sweep import LONG, TEST, VAL, choose

# What a submission shares with the config that it answers. Threads and methods are its own.
SHARED = ("model", "task", "batch_size", "steps", "learning_rate", "lora", "seeds", "evaluation")
CLOSE = 1e-4  # relative; prompts' losses are kept with six digits


def check_result(folder: Path, config: Path | None = None) -> tuple[SweepConfig, list[str]]:
    """Check a sweep's folder.

    Args:
        folder: with ``val/result.json`` and ``test/result.json``, and ``long/result.json`` if the
            config asks for it.
        config: the published config that it answers; None to look for it.

    Returns:
        The config, and what is wrong, one line for each problem; nothing if it passes.

    Raises:
        ConfigError: if there is no result to check, or no published config that it could answer.
    """
    val, test = (_read(folder / stage) for stage in (VAL, TEST))
    published = _published(test, config)
    stages = {VAL: val, TEST: test}
    if published.long is not None:
        stages[LONG] = _read(folder / LONG)
    problems: list[str] = []
    for name, result in stages.items():
        given = result.run_config()
        wanted = published.stage(
            "val" if name == VAL else "test",
            given.methods,
            published.tuning.seeds if name == VAL else published.seeds,
            (published.long or 1) if name == LONG else 1,
        )
        problems += [f"{name}: {line}" for line in _config_problems(given, wanted)]
        problems += [f"{name}: {line}" for line in _result_problems(result, given)]
    # Beside a baseline that is tuned less, every method looks better.
    tuned = [point for method in published.methods for point in method.points()]
    asked, tried = (
        [_settings(method) for method in methods if method.family == BASELINE]
        for methods in (tuned, val.run_config().methods)
    )
    if tried != asked:
        problems.append(f"val: config.methods: {BASELINE} has another grid than the published one")
    if not problems:
        problems += _choice_problems(stages, published)
    return published, problems


def _read(folder: Path) -> Result:
    result = read_result(folder)
    if result is None:
        raise ConfigError(
            f"{folder / FILE}: not there; a submission is the folder that `python -m benchmarks "
            "sweep` writes, with val, test and, if the config asks for it, long"
        )
    return result


def _published(test: Result, path: Path | None) -> SweepConfig:
    """The sweep that a result answers."""
    if path is not None:
        found = load_config(path)
        if not isinstance(found, SweepConfig):
            raise ConfigError(f"{path}: no sweep; a submission answers one")
        return found
    given = test.run_config()
    answered: list[SweepConfig] = []
    for candidate in sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS / "paper").glob("*.yaml")]):
        if candidate.stem == "base":
            continue
        config = load_config(candidate)
        if isinstance(config, SweepConfig) and (config.model.name, config.task) == (
            given.model.name,
            given.task,
        ):
            answered.append(config)

    def differences(config: SweepConfig) -> int:
        return len(list(_config_problems(given, config.stage("test", given.methods, config.seeds))))

    if answered:  # several share a model and a task, a sweep and its short form for instance
        return min(answered, key=differences)
    raise ConfigError(
        f"no published sweep has the model {given.model.name!r} and this task; name the config "
        "that it answers with --config"
    )


def _config_problems(given: RunConfig, wanted: RunConfig) -> Iterator[str]:
    if given.model.dry:
        yield "config.model.dry: a dry run measures nothing"
    for name in SHARED:
        ours, theirs = getattr(wanted, name), getattr(given, name)
        if ours != theirs:
            yield f"config.{name}: {theirs}, the published config has {ours}"
    if BASELINE not in {method.family for method in given.methods}:
        yield f"config.methods: without {BASELINE} there is nothing to compare with"


def _result_problems(result: Result, config: RunConfig) -> Iterator[str]:
    for failure in result.failures:
        yield f"{failure.method}, seed {failure.seed}: failed ({failure.error})"
    for environment in [result.environment, *result.continued]:
        for key in ("command", "commit", "processor"):
            if not environment.get(key):
                yield f"environment.{key}: missing"
        if str(environment.get("commit", "")).endswith("+"):
            yield "environment.commit: made from files that are not committed"
    if result.start is None:
        yield "start: missing"
        return
    known = {(method.key, seed) for method in config.methods for seed in config.seeds}
    present = [(record.method, record.seed) for record in result.records]
    for key, seed in sorted(known - set(present)):
        yield f"{key}, seed {seed}: no record"
    for key, seed in sorted(set(present) - known):
        yield f"{key}, seed {seed}: a record that the config does not ask for"
    if len(set(present)) < len(present):
        yield "records: a run stands there twice"
    for record in result.records:
        for problem in _record_problems(record, config, result.start):
            yield f"{record.method}, seed {record.seed}: {problem}"


def _record_problems(record: Record, config: RunConfig, start: Start) -> Iterator[str]:
    numbers = [
        value
        for point in record.curve
        for value in (point.task_loss, point.alignment_loss, *(point.prompts or ()))
    ]
    if not all(math.isfinite(value) and value >= 0 for value in numbers):
        yield "a loss is negative or not finite"
        return
    steps = [point.step for point in record.curve]
    expected = sorted({*range(0, config.steps + 1, config.evaluation.every), config.steps})
    if steps != expected:
        yield f"curve: measured at steps {steps}, the config asks for {expected}"
        return
    first, last = record.curve[0], record.curve[-1]
    pairs = [
        ("task_loss.start", record.task_loss.start, start.task_loss),
        ("alignment_loss.start", record.alignment_loss.start, start.alignment_loss),
        ("curve's first task loss", first.task_loss, start.task_loss),
        ("curve's first alignment loss", first.alignment_loss, start.alignment_loss),
        ("task_loss.end", record.task_loss.end, last.task_loss),
        ("alignment_loss.end", record.alignment_loss.end, last.alignment_loss),
        ("refusal_rate.start", record.refusal_rate.start, start.refusal_rate),
        ("over_refusal_rate.start", record.over_refusal_rate.start, start.over_refusal_rate),
        (
            "seconds.total",
            record.seconds.total,
            record.seconds.task + record.seconds.safety + record.seconds.evaluation,
        ),
    ]
    if config.evaluation.per_prompt:
        for point in record.curve:
            prompts = point.prompts or []
            if len(prompts) != config.evaluation.alignment_prompts:
                yield f"step {point.step}: {len(prompts)} prompts' losses"
                return
            mean = sum(prompts) / len(prompts)
            pairs.append((f"step {point.step}'s alignment loss", point.alignment_loss, mean))
    for name, value, other in pairs:
        if not math.isclose(value, other, rel_tol=CLOSE, abs_tol=1e-9):
            yield f"{name}: {value}, but elsewhere it is {other}"
    asked = config.evaluation
    for name, rate, prompts_asked in (
        ("refusal_rate.end", record.refusal_rate.end, asked.refusal_prompts),
        ("over_refusal_rate.end", record.over_refusal_rate.end, asked.over_refusal_prompts),
    ):
        count = rate * prompts_asked
        if not (0 <= rate <= 1 and math.isclose(count, round(count), abs_tol=1e-6)):
            yield f"{name}: {rate} is no share of {prompts_asked} prompts"
    if asked.separation and asked.per_prompt:
        yield from _separation_problems(record, start, asked)
    if config.evaluation.per_prompt and first.prompts != start.prompts:
        yield "curve's first prompts' losses: not those of the start"
    if record.passes.safety_forward > 0 and not record.seconds.safety > 0:
        yield "seconds.safety: no time for safety passes"
    if record.tokens.task < record.passes.task_forward:
        yield "tokens.task: fewer tokens than passes"
    if (record.passes.safety_forward > 0) != (record.tokens.safety_forward > 0):
        yield "passes.safety_forward and tokens.safety_forward: one of them is zero"


def _separation_problems(record: Record, start: Start, asked: EvaluationConfig) -> Iterator[str]:
    """Whether the separations are what the prompts' scores give."""
    prompts = (asked.refusal_prompts, asked.over_refusal_prompts)
    span = record.separation
    if span is None or span.start != start.separation:
        yield "separation.start: not that of the start"
        return
    for name, value, scores in (
        ("start", span.start, start.refusal_nll),
        ("end", span.end, record.refusal_nll),
    ):
        if scores is None or (len(scores.harmful), len(scores.harmless)) != prompts:
            yield f"refusal_nll at the {name}: not of {prompts[0]} and {prompts[1]} prompts"
        elif not math.isclose(value, found := separation(scores), rel_tol=CLOSE):
            yield f"separation.{name}: {value}, but the prompts' scores give {found}"


def _choice_problems(stages: Mapping[str, Result], published: SweepConfig) -> Iterator[str]:
    """Whether the points on test, and in the long runs, are those that the runs on val choose."""
    chosen = choose(stages[VAL].run_config().methods, stages[VAL], published.tuning)
    for name, number in ((TEST, None), (LONG, 1)):
        if name not in stages:
            continue
        wanted = [_settings(point) for group in chosen.values() for point in group[:number]]
        given = [_settings(point) for point in stages[name].run_config().methods]
        for point in given:
            if point not in wanted:
                yield f"{name}: {point['label']}: not what the runs on val choose"
        for point in wanted:
            if point not in given:
                yield f"{name}: {point['label']}: chosen by the runs on val, but not there"


def _settings(method: MethodConfig) -> dict[str, object]:
    return method.model_dump(mode="json")


# --- methods ---


def check_method(name: str, steps: int = 4) -> list[str]:
    """Train the tiny model with a method and compare what it says with what it does.

    Args:
        name: as `benchmarks.methods.method_class` takes it.
        steps: of training.

    Returns:
        What is wrong, one line for each problem; nothing if it passes.

    Raises:
        ConfigError: if there is no such method.
    """
    try:
        method_class(name).Options()
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    try:
        first, second = _trial(name, steps), _trial(name, steps)
    except Exception as error:  # whatever a stranger's code raises is the answer
        return [f"it raises {type(error).__name__}: {error}"]
    problems = first.problems
    if first.losses != second.losses:
        problems.append(
            "two runs with one seed differ: whatever it draws must follow from setup.seed"
        )
    return problems


class _Trial:
    def __init__(self) -> None:
        self.problems: list[str] = []
        self.losses: list[float] = []


def _trial(name: str, steps: int) -> _Trial:
    from benchmarks.bench import Bench
    from benchmarks.models import trainable
    from benchmarks.training import StepLoss

    config = RunConfig.model_validate(
        {
            "model": {"name": "tiny"},
            "task": {"name": "tiny", "max_length": 64},
            "batch_size": 8,
            "steps": steps,
            "learning_rate": 2e-3,
            "lora": {"target_modules": ["q_proj", "v_proj"]},
            "methods": [{"name": name}],
            "evaluation": {"refusal_prompts": 2, "over_refusal_prompts": 2},
        }
    )
    bench = Bench(config)
    method = config.methods[0]
    trial = _Trial()
    calls = _Calls()
    hook = bench.model.register_forward_hook(calls)
    device = next(bench.model.parameters()).device
    try:
        with trainable(bench.model, config.lora, seed=0) as (model, params):
            before = bench.evaluator.losses(model)
            calls.count = 0
            built = method_class(name)(bench.setup(method, 0, model, params), method.options())
            losses = [StepLoss(model, batch) for batch in bench.task_batches(0, device)]
            trial.losses = [built.step(loss) for loss in losses]
            built.finish()
            counted = sum(loss.forward for loss in losses) + built.cost.forward
            made = calls.count
            with built.evaluating():
                after = bench.evaluator.losses(model)
            trial.losses += [after.task, after.alignment]
    finally:
        hook.remove()
    checks = [
        (all(map(math.isfinite, trial.losses)), f"losses are not finite: {trial.losses}"),
        (
            counted == made,
            f"the model was called {made} times in training, task and cost.forward say {counted}: "
            "count every pass on safety examples",
        ),
        (
            after.task < before.task,
            f"it does not learn: task loss {before.task:.3f} -> {after.task:.3f}",
        ),
        (
            built.cost.forward == 0 or built.cost.seconds > 0,
            "cost.seconds is 0: time the passes with `with self.cost.clock():`",
        ),
        (
            built.cost.forward_tokens >= built.cost.forward,
            "cost.forward_tokens: fewer tokens than passes; use cost.add(batch, ...)",
        ),
    ]
    trial.problems = [problem for passed, problem in checks if not passed]
    return trial


class _Calls:
    """A forward hook that counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: object, arguments: object, output: object) -> None:
        self.count += 1
