"""The commands on a model whose weights are quantised already: adapters only, and no silence."""

# ruff: noqa: F401, F811
from __future__ import annotations

import pytest
import torch
from test_finetune import config, files  # the fixture is shared
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from typer.testing import CliRunner

from safeopt.cli.app import app
from safeopt.finetuning.finished import load_finished
from safeopt.finetuning.prepare import prepare
from safeopt.finetuning.repair import RepairConfig, prepare_repair
from safeopt.finetuning.run import run
from safeopt.plan import plan

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def quantised(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(files / "model", quantization_config=four)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(folder)
    return str(folder)


def test_an_adapter_is_trained_and_has_no_profile(files, quantised, tmp_path):
    prepared = prepare(config(files, tmp_path, model=quantised, max_steps=2))
    layers = [m for m in prepared.inputs.model.modules() if type(m).__name__ == "Linear4bit"]
    packed = [getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in layers]
    assert packed
    assert not any(packed), "no gradient would come through after the model has answered"
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in layers)
    assert run(prepared).finished
    with pytest.raises(ValueError, match=f"run={tmp_path}, model={quantised}: .* are quantised"):
        load_finished(tmp_path, None, 8)


def test_all_parameters_are_not(files, quantised, tmp_path):
    with pytest.raises(ValueError, match=f"full, model={quantised}: its weights are quantised"):
        prepare(config(files, tmp_path / "out", model=quantised, full=True))
    asked = RepairConfig(
        model=quantised,
        reference=str(files / "model"),
        safety=files / "safety.jsonl",
        out=tmp_path / "out",
    )
    with pytest.raises(ValueError, match=f"model={quantised}: its weights are quantised"):
        prepare_repair(asked)


def test_a_plan_says_that_it_counts_them_as_before(files, quantised):
    assert plan(quantised, 4).quantised
    assert not plan(str(files / "model"), 4).quantised
    shown = CliRunner().invoke(app, ["plan", "--model", quantised]).output
    assert "The weights are quantised; they are counted as before that." in shown
