"""`safeopt diagnose` as a user runs it: what it prints, what it writes, what it refuses."""

# ruff: noqa: F401, F811
from __future__ import annotations

import json

import pytest
from test_finetune import files  # the fixture is shared
from typer.testing import CliRunner

from safeopt.cli.app import app


def arguments(files, *more):
    return [
        "diagnose", "--model", str(files / "model"), "--train", str(files / "train.jsonl"),
        "--safety", str(files / "safety.jsonl"), *more,
    ]  # fmt: skip


def test_the_report_has_what_programs_and_people_read(files, tmp_path):
    out = tmp_path / "report"
    done = CliRunner().invoke(app, arguments(files, "--out", str(out)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "curvature coupling" in done.output
    data = json.loads((out / "aic.json").read_text(encoding="utf-8"))
    assert data["schema"] == "safeopt.aic/1"
    keys = {"name", "value", "interval", "threshold", "holds"}
    assert all(keys <= set(condition) for condition in data["conditions"])
    assert [c["name"] for c in data["conditions"]] == [
        "low_rank_sensitivity", "initial_orthogonality", "curvature_coupling",
    ]  # fmt: skip
    for condition in data["conditions"]:
        low, high = condition["interval"]
        assert low <= condition["value"] <= high
    assert len(data["top_eigenvalues"]) == data["rank"] == 8
    assert sum(layer["curvature"] for layer in data["layers"]) == pytest.approx(1)
    assert data["config"]["model"] == str(files / "model")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert data["verdict"].split(".")[0].replace("'", "&#39;") in page
    assert "99% of random directions of that length stay below the threshold" in page
    assert page.count("data:image/svg+xml") == 2
    assert [path.name for path in out.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--batches", "1"), "at least two"),
        (("--batches", "40"), "need 160 training examples"),
        (("--rank", "16"), "rank=16"),
        (("--out", __file__), "it is a file"),
        (("--lora-rank", "0"), "lora_rank=0"),
    ],
)
def test_wrong_arguments_are_one_sentence(files, change, words):
    done = CliRunner().invoke(app, arguments(files, *change))
    assert done.exit_code == 2, done.output
    assert words in done.output.replace("\n", "")
    assert "Traceback" not in done.output


def test_a_single_safety_prompt_is_too_few(files, tmp_path):
    path = tmp_path / "safety.jsonl"
    path.write_text((files / "safety.jsonl").read_text().splitlines()[0], encoding="utf-8")
    done = CliRunner().invoke(app, arguments(files, "--safety", str(path)))
    assert done.exit_code == 2, done.output
    assert f"safety: refused prompts in {path}: 1; at least 2" in done.output.replace("\n", "")


def test_the_report_is_written_before_it_is_shown(files, tmp_path, monkeypatch):
    def closed(result, to):
        raise BrokenPipeError("closed")

    monkeypatch.setattr("safeopt.cli.diagnose.show", closed)
    done = CliRunner().invoke(app, arguments(files, "--out", str(tmp_path), "--batches", "2"))
    assert done.exit_code == 2, done.output
    assert {path.name for path in tmp_path.iterdir()} >= {"aic.json", "report.html"}
