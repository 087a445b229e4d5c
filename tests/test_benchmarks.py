"""The benchmark on the tiny model: configs, runs, resuming, determinism, report."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from full_disk import assert_pages_survive
from matplotlib.colors import to_rgb
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import tiny
from benchmarks.__main__ import app, main
from benchmarks.config import CONFIGS, ConfigError, LoraConfig, RunConfig, load_config
from benchmarks.figures import summaries, targets
from benchmarks.inference import greedy, response_nll
from benchmarks.methods import Setup
from benchmarks.methods.adamw import AdamW
from benchmarks.methods.replay import Replay, ReplayOptions
from benchmarks.models import trainable
from benchmarks.plots import COLORS, look, plots
from benchmarks.records import (
    OTHERS,
    Failure,
    Result,
    Span,
    leave_others,
    read_result,
    write_result,
)
from benchmarks.report import report
from benchmarks.run import alone, continued, run
from benchmarks.tasks import batches, material, single_batches, task_loss

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def short_training():
    """Refusals need not be perfect here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "STEPS", 60)
        tiny._kept_state.cache_clear()
        yield
    tiny._kept_state.cache_clear()


def plain_config() -> dict:
    config = yaml.safe_load((CONFIGS / "demo-tiny.yaml").read_text(encoding="utf-8"))
    config["steps"] = 4
    config["evaluation"] = {
        "every": 2,
        "alignment_prompts": 8,
        "refusal_prompts": 4,
        "over_refusal_prompts": 4,
        "new_tokens": 4,
    }
    return config


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate(plain_config())


def without_timings(value):
    if isinstance(value, dict):
        return {
            key: without_timings(inner)
            for key, inner in value.items()
            if key not in ("seconds", "peak_bytes")
        }
    return [without_timings(inner) for inner in value] if isinstance(value, list) else value


# --- configs ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 4}, "stepz: no such setting"),
        ({"steps": 0}, "steps=0: Input should be greater than 0"),
        ({"task": {"name": "poetry"}}, "task.name='poetry'"),
        ({"methods": []}, "methods=[]"),
        ({"methods": [{"name": "magic"}]}, "no method has this name; known are adamw"),
        ({"methods": [{"name": "adamw", "rank": 3}]}, "rank: no such setting"),
        ({"methods": [{"name": "replay", "weight": -1}]}, "weight=-1: Input should be greater"),
        ({"methods": [{"name": "projected_adamw", "rnak": 3}]}, "rnak: no argument of Projected"),
        ({"methods": [{"name": "projected_adamw", "rank": 0}]}, "rank=0: "),
        ({"methods": [{"name": "projected_adamw", "refresh": {"often": 1}}]}, "often"),
        ({"methods": [{"name": "adamw"}, {"name": "adamw"}]}, "adamw: listed twice"),
        ({"seeds": [1, 1]}, "each seed may stand there once"),
        ({"model": {"name": "some/model"}}, "use both or neither"),
        ({"evaluation": {"split": "train"}}, "evaluation.split='train'"),
    ],
)
def test_wrong_configs_are_explained(tmp_path: Path, change: dict, message: str):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**plain_config(), **change}), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "just words"])
def test_files_that_are_no_config(tmp_path: Path, text: str):
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"expected a mapping|no valid YAML"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path):
    assert load_config(path).methods


def test_too_many_prompts_are_refused(config: RunConfig):
    changed = plain_config()
    changed["evaluation"]["refusal_prompts"] = 10_000
    with pytest.raises(ConfigError, match=r"refusal_prompts=10000: there are only \d+"):
        material(RunConfig.model_validate(changed), tiny.tokenizer())


def test_the_command_line_says_what_is_wrong_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "no finished run there" in shown
    assert "Traceback" not in shown


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def terminated(*_) -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("stop", "code"), [(interrupted, 130), (terminated, 143)])
def test_a_command_that_is_stopped_tells_how_to_go_on(tmp_path, monkeypatch, capsys, stop, code):
    out = tmp_path / "out"
    arguments = ["benchmarks", "run", str(CONFIGS / "demo-tiny.yaml"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr("benchmarks.run.run", stop)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    assert "the same command goes on" in capsys.readouterr().err
    assert list(out.iterdir()) == [], "the folder's lock is gone"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_point_s_name_is_told_whole(tmp_path, monkeypatch, capsys):
    plain = plain_config()
    plain["task"]["val_examples"] = 8
    plain |= {"tuning": {}, "methods": [{"name": "adamw", "grid": {"learning_rate": [0.1, 0.1]}}]}
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    arguments = ["sweep", str(tmp_path / "twice.yaml"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert "adamw[learning_rate=0.1]" in capsys.readouterr().err.replace("\n", "")


# --- passes ---


def test_greedy_answers_are_those_of_plain_passes(config: RunConfig):
    model = tiny.model()
    rows = material(config, tiny.tokenizer())
    prompts = [row["input_ids"][:-5] for row in rows.alignment]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answer = ids[len(prompt) :]
        expected.append(answer[: answer.index(2)] if 2 in answer else answer)
    assert greedy(model, prompts, 6, [2]) == expected


def test_the_response_loss_is_the_model_s_own(config: RunConfig):
    model = tiny.model()
    row = material(config, tiny.tokenizer()).held_out[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=labels).loss)
    sums, counts = response_nll(model, [row])
    assert float(sums / counts) == pytest.approx(expected, rel=1e-5)
    batch = next(batches([row], 1, 1, 0, 0, CPU))
    assert task_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lora", [None, LoraConfig()], ids=["full", "lora"])
def test_a_run_leaves_the_starting_point_as_it_was(lora: LoraConfig | None):
    model = tiny.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with trainable(model, lora, seed=0) as (trained, params):
        assert trained.training
        with torch.no_grad():
            for parameter in params:
                parameter += 1
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not model.training


def test_replay_follows_the_gradient_of_both_losses(config: RunConfig):
    model, rows = tiny.model(), material(config, tiny.tokenizer())
    batch = next(batches(rows.train, 4, 1, 0, rows.pad, CPU))
    safety = single_batches(rows.safety, 0, CPU)
    params = list(model.parameters())
    method = Replay(Setup(model, params, safety, [], 1e-3, 0), ReplayOptions(weight=0.5))

    class Loss:
        def __init__(self):
            self.batch = batch

        def __call__(self):
            return task_loss(model, batch)

    expected = torch.autograd.grad(
        task_loss(model, batch) + 0.5 * task_loss(model, safety[0]), params
    )
    method.step(Loss())
    for parameter, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert (method.cost.forward, method.cost.backward) == (1, 1)
    assert method.cost.backward_tokens == safety[0]["input_ids"].shape[1]
    assert method.cost.seconds > 0


# --- runs ---


def test_the_tiny_demo_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "demo-tiny.yaml").write_text(yaml.safe_dump(plain_config()), encoding="utf-8")
    monkeypatch.setattr("benchmarks.__main__.CONFIGS", folder)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["demo", "--tiny", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output

    result = Result.model_validate_json((out / "result.json").read_text(encoding="utf-8"))
    assert [record.method for record in result.records] == ["adamw", "replay", "projected_adamw"]
    for record in result.records:
        assert [point.step for point in record.curve] == [0, 2, 4]
        assert record.curve[0] == result.records[0].curve[0]
        assert record.curve[-1].task_loss == record.task_loss.end < record.task_loss.start
        assert record.passes.task_forward == record.passes.task_backward == 4
        assert record.peak_bytes > 10**7
        seconds = record.seconds
        assert seconds.total == pytest.approx(seconds.task + seconds.safety + seconds.evaluation)
    adamw, replay, ours = result.records
    assert adamw.passes.safety_forward == adamw.tokens.safety_forward == 0
    assert adamw.seconds.safety == 0
    assert replay.passes.safety_forward == replay.passes.safety_backward == 4
    assert ours.passes.safety_forward > 0

    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == 3
    assert "http://" not in page
    assert "https://" not in page
    for name in ("alignment_loss", "task_loss", "frontier"):
        assert (out / f"{name}.png").stat().st_size > 1000


def test_a_crash_keeps_what_is_finished(tmp_path: Path, config: RunConfig, monkeypatch):
    whole = run(config, tmp_path / "whole", QUIET)

    def crash(self):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Replay, "after_backward", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, tmp_path / "crashed", QUIET)
    kept = read_result(tmp_path / "crashed")
    assert [record.method for record in kept.records] == ["adamw"]
    assert not list((tmp_path / "crashed").glob("*.partial"))

    resumed = run(config, tmp_path / "crashed", QUIET)
    assert resumed.records[0] == kept.records[0]
    # The same numbers as without the crash: this is also the test that runs are deterministic.
    assert without_timings(resumed.model_dump()) == without_timings(whole.model_dump())
    again = json.loads((tmp_path / "crashed" / "result.json").read_text(encoding="utf-8"))
    assert run(config, tmp_path / "crashed", QUIET).model_dump(mode="json") == again


def test_a_run_that_diverges_costs_no_other(tmp_path: Path, config: RunConfig, monkeypatch):
    def diverge(self):
        for parameter in self.setup.params:
            parameter.data.fill_(float("nan"))

    whole = run(config, tmp_path / "whole", QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "after_step", diverge)
        result = run(config, tmp_path / "diverged", QUIET)
    finished = {record.method for record in whole.records}
    kept = {record.method for record in result.records}
    assert {failure.method for failure in result.failures} == finished - kept >= {"adamw"}
    assert "DivergedError" in result.failures[0].error
    resumed = run(config, tmp_path / "diverged", QUIET)
    assert without_timings(resumed.model_dump()) == without_timings(whole.model_dump())


def test_another_commit_that_continues_a_result_is_kept(
    tmp_path: Path, config: RunConfig, monkeypatch
):
    result = run(config, tmp_path, QUIET)
    assert result.continued == []
    for commit in ("1" * 40, "1" * 40, "2" * 40):
        result.records.pop()
        write_result(result, tmp_path)
        here = result.environment | {"commit": commit}
        monkeypatch.setattr("benchmarks.run.environment", lambda threads, here=here: here)
        result = run(config, tmp_path, QUIET)
    assert [later["commit"][0] for later in result.continued] == ["1", "2"]
    report(tmp_path, QUIET)
    assert "2" * 40 in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_method_that_was_edited_between_runs_is_told(tmp_path: Path, config: RunConfig):
    """Its file need not be part of the checkout, and no commit has the edit."""
    own = tmp_path / "mine.py"
    source = "from benchmarks.methods.adamw import AdamW\n\n\nclass Mine(AdamW):\n    pass\n"
    own.write_text(source, encoding="utf-8")
    fields = {**config.as_json(), "methods": [{"name": f"{own}:Mine", "label": "mine"}]}
    config, out = RunConfig.model_validate(fields), tmp_path / "out"
    result = run(config, out, QUIET)
    for edit, changes in (("", 0), ("# edited\n", 1), ("# edited\n", 1)):
        own.write_text(source + edit, encoding="utf-8")
        result.records.pop()
        write_result(result, out)
        result = run(config, out, QUIET)
        assert len(result.continued) == changes
    (later,) = result.continued
    assert later["sources"] != result.environment["sources"]
    assert later["commit"] == result.environment["commit"]
    report(out, QUIET)
    assert "with other sources" in (out / "report.html").read_text(encoding="utf-8")


def test_a_result_is_parsed_once(tmp_path: Path, config: RunConfig, monkeypatch):
    whole = run(config, tmp_path, QUIET)
    parsed = []
    inner = json.loads
    monkeypatch.setattr("benchmarks.records.json.loads", lambda t: parsed.append(t) or inner(t))
    assert read_result(tmp_path) == whole
    assert len(parsed) == 1


@pytest.mark.parametrize("command", ["run", "monitor", "overhead", "curvature"])
def test_one_process_at_a_time_works_on_a_result(tmp_path: Path, command: str):
    tiny = str(CONFIGS / "demo-tiny.yaml")
    given = {"run": [tiny], "monitor": [tiny], "overhead": ["--config", tiny]}
    arguments = [command, *given.get(command, ["--tiny"]), "--out", str(tmp_path)]
    with alone(tmp_path), pytest.raises(ConfigError, match="another process is working on"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", OTHERS)
def test_a_folder_of_another_command_is_named_and_left_as_it_is(tmp_path: Path, command: str):
    results, tiny = CONFIGS.parent / "results", str(CONFIGS / "demo-tiny.yaml")
    content = (results / command / "result.json").read_bytes()
    path = tmp_path / "result.json"
    path.write_bytes(content)
    for call in (["report", str(tmp_path)], ["run", tiny, "--out", str(tmp_path)]):
        with pytest.raises(ConfigError, match=f"result of `python -m benchmarks {command}`"):
            CliRunner().invoke(app, call, catch_exceptions=False)
    leave_others(tmp_path, command)
    assert path.read_bytes() == content
    given = {"monitor": [tiny], "overhead": ["--config", tiny], "curvature": ["--tiny"]}
    call = [command, *given[command], "--out", str(tmp_path)]
    for other in [*(set(OTHERS) - {command}), "demo"]:
        path.write_bytes((results / other / "result.json").read_bytes())
        with pytest.raises(ConfigError, match=r"holds the result of .* choose another --out"):
            CliRunner().invoke(app, call, catch_exceptions=False)


def test_runs_that_are_missing_are_told(tmp_path: Path, config: RunConfig):
    result = run(config, tmp_path, QUIET)
    report(tmp_path, QUIET)
    assert "same seed" in (tmp_path / "report.html").read_text(encoding="utf-8")
    gone = result.records.pop()
    result.failures.append(Failure(method=gone.method, seed=gone.seed, error="out of [memory]"))
    write_result(result, tmp_path)
    console = Console(record=True, width=200)
    report(tmp_path, console)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for shown in (console.export_text(), page):
        assert f"{gone.method}, seed {gone.seed}: out of [memory]" in shown
    assert "same seed" not in page


def test_no_figure_is_cut_off_in_80_characters(tmp_path: Path):
    """With so many methods that they do not fit beside each other."""
    names = ["adamw", *(f"safety_sam number {i}" for i in range(5))]
    records = [record(name, (0.1, 1.4, 1.4), 2.0, 0.5, 12.3) for name in names]
    config = RunConfig.model_validate(plain_config()).as_json()
    result = {"environment": {"packages": {}}, "config": config, "records": records}
    write_result(Result.model_validate(result), tmp_path)
    narrow = Console(record=True, width=80)
    report(tmp_path, narrow)
    shown = narrow.export_text()
    assert "…" not in shown
    assert shown.count("✗ 100.0%") == 2 * 5  # the rise at the end and the largest, as AdamW's
    assert shown.count("✗ 62.5%") == shown.count("✓ 12.0%") == 5


def test_a_folder_belongs_to_one_config(tmp_path: Path, config: RunConfig):
    other = RunConfig.model_validate({**plain_config(), "steps": 5})
    write_result(Result(environment={}, config=other.as_json()), tmp_path)
    with pytest.raises(ConfigError, match="the result of another config"):
        run(config, tmp_path, QUIET)
    earlier = config.as_json()
    del earlier["evaluation"]["separation"]  # as written before there was this entry
    for change in (False, True):
        write_result(Result(environment={}, config=earlier), tmp_path)
        assert continued(config, tmp_path, methods_may_change=change).config == config.as_json()
    for damaged in (b"{", b'{"records": "\xff"}'):
        (tmp_path / "result.json").write_bytes(damaged)
        with pytest.raises(ConfigError, match="no result of this benchmark"):
            run(config, tmp_path, QUIET)


# --- figures ---


def record(method: str, alignment: tuple, task: float, refusal: float, safety: float) -> dict:
    curve = [
        {"step": step, "task_loss": 2.0, "alignment_loss": value, "seconds": step}
        for step, value in enumerate(alignment)
    ]
    return {
        "method": method,
        "model": "m",
        "task": "t",
        "seed": 0,
        "steps": 2,
        "learning_rate": 1e-3,
        "batch_tokens": 512,
        "curve": curve,
        "alignment_loss": {"start": alignment[0], "end": alignment[-1]},
        "task_loss": {"start": 2.0, "end": task},
        "refusal_rate": {"start": 0.8, "end": refusal},
        "over_refusal_rate": {"start": 0.1, "end": 0.11},
        "seconds": {"total": 110, "task": 90, "safety": safety, "evaluation": 10},
        "passes": dict.fromkeys(
            ("task_forward", "task_backward", "safety_forward", "safety_backward"), 2
        ),
        "tokens": {"task": 1024, "safety_forward": 128, "safety_backward": 128},
        "peak_bytes": 10**9,
    }


@pytest.fixture
def invented() -> Result:
    return Result.model_validate(
        {
            "records": [
                record("adamw", (0.1, 0.7, 0.5), 1.0, 0.2, 0),
                record("replay", (0.1, 0.1, 0.1), 1.0, 0.8, 8),
                record("projected_adamw", (0.1, 0.4, 0.12), 1.02, 0.8, 10),
            ],
            "environment": {"packages": {}},
            "config": {**RunConfig.model_validate(plain_config()).as_json()},
        }
    )


def test_figures_against_their_targets(invented: Result):
    methods = summaries(invented)
    reached = {t.name: t.figures.get("projected_adamw") for t in targets(methods)}
    lost = targets(methods)[0].figures["adamw"]
    assert (lost.text, lost.met) == ("60 points", True)
    figures = {name: (f.text, f.met) for name, f in reached.items() if f}
    assert figures == {
        "rise in alignment loss, share of AdamW's": ("5.0%", True),
        "largest rise at any measured step, share of AdamW's largest": ("50.0%", False),
        "refusals kept": ("100.0%", True),
        "task loss against AdamW's": ("+2.0%", False),
        "change in over-refusal": ("+1.0 points", True),
        "safety's share of the training time": ("10.0%", True),
        "safety's time against replay's": ("125.0%", False),
    }
    ours = methods[2]
    assert ours.share_large == pytest.approx(10 / (10 + 90 * 32))
    assert ours.share_tokens == pytest.approx(256 / (2048 + 256))


def test_many_methods_leave_the_names_of_the_figures(invented: Result, tmp_path: Path):
    (first, *_) = invented.records
    for number in range(9):
        invented.records.append(first.model_copy(update={"method": f"projected_adamw_{number}"}))
    write_result(invented, tmp_path)
    console = Console(record=True, width=80)
    report(tmp_path, console)
    assert "refusals kept" in console.export_text()
    assert len({look(number) for number in range(49)}) == 49


def shown(result: Result, folder: Path) -> tuple[str, str]:
    """The report in a terminal of 80 columns, and the page."""
    write_result(result, folder)
    console = Console(record=True, width=80)
    page = report(folder, console).read_text(encoding="utf-8")
    return console.export_text(), page


def test_separation_is_shown_where_it_was_measured(invented: Result, tmp_path: Path):
    for text in shown(invented, tmp_path):
        assert "sepa-" not in text
        assert ">separation<" not in text
    for record, end in zip(invented.records, (0.713, 0.901, 0.942), strict=True):
        record.separation = Span(start=0.975, end=end)
    for text in shown(invented, tmp_path):
        assert all(value in text for value in ("0.975", "0.713", "0.901", "0.942"))
        assert "…" not in text


def test_learning_rates_are_shown_where_they_differ(invented: Result, tmp_path: Path):
    text, page = shown(invented, tmp_path)
    assert "rate" not in text.split("start")[0]
    assert "<th>learning rate</th>" not in page
    for record in invented.records:
        record.separation = Span(start=0.975, end=0.9)
    invented.records[2].learning_rate = 0.00125
    text, page = shown(invented, tmp_path)
    assert "rate" in text.split("start")[0]
    assert "<td>0.00125</td>" in page
    assert "0.00125" in text
    assert "…" not in text


def test_the_names_in_the_plots_are_dark_enough_to_be_read(invented: Result):
    """A contrast of 4.5 to the white page (WCAG 2.2, 1.4.3)."""
    (first, *_) = invented.records
    invented.records = [first.model_copy(update={"method": f"m_{i}"}) for i in range(len(COLORS))]
    for figure in plots(invented).values():
        (axes,) = figure.axes
        names = [text for text in axes.texts if text.get_text().startswith("m ")]
        assert len(names) == len(COLORS)
        for name in names:
            light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                     for c in to_rgb(name.get_color())]  # fmt: skip
            luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), light, strict=True))
            assert 1.05 / (luminance + 0.05) >= 4.5


def test_a_figure_that_falls_short_is_shown(invented: Result, tmp_path: Path):
    write_result(invented, tmp_path)
    console = Console(record=True, width=120, file=(tmp_path / "shown.txt").open("w"))
    page = report(tmp_path, console).read_text(encoding="utf-8")
    for shown in (console.export_text(), page):
        assert "✗ 50.0%" in shown
        assert "✗ 125.0%" in shown
        assert "at most 25%" in shown
    assert "3 figures fall short" in page
    assert_pages_survive(lambda: report(tmp_path, console), tmp_path / "report.html")
