"""`safeopt plan`: parameter counts against known totals, bytes against real objects."""

import json

import pytest
import torch
from test_architectures import built
from test_factored import factored
from tiny_models import randomise, safety_batch, tiny_gpt2, tiny_llama, trainable, with_lora
from typer.testing import CliRunner

from safeopt.cli.app import app
from safeopt.curvature.bases import empty_basis
from safeopt.curvature.solvers import gram
from safeopt.finetuning.adapter import default_lora
from safeopt.optim.elastic import ElasticPull
from safeopt.plan import Assumptions, architectures, load_config, meta_model, plan

# Published totals: each weight once, also where the output layer shares the embedding.
TOTALS = {
    "llama-2-7b": 6_738_415_616,
    "falcon-40b": 41_303_293_952,
    "mistral-7b": 7_241_732_096,
    "qwen3-1.7b": 1_720_574_976,
    "llama-3.2-3b": 3_212_749_824,
}


def test_the_table_is_complete():
    assert architectures() == sorted(TOTALS)


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_counts(name):
    network = meta_model(load_config(name), name)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    full = plan(name, 32, lora=None)
    assert full.parameters == full.trained == TOTALS[name]
    assert full.parameters == sum(p.numel() for p in network.parameters())
    assert full.parameter_bytes == full.gradient_bytes == 2 * TOTALS[name]
    assert full.optimizer_bytes == 4 * TOTALS[name]
    assert full.bases["dense"].nbytes == 32 * 4 * TOTALS[name]


def test_adapters_of_llama_2():
    """PEFT's default: q and v, 32 layers, r(d_in + d_out) each; in float32."""
    figures = plan("llama-2-7b", 32, lora=8)
    assert figures.trained == 32 * 2 * 8 * (4096 + 4096)
    assert figures.optimizer_bytes == 2 * figures.gradient_bytes == 8 * figures.trained
    assert figures.parameter_bytes == 2 * TOTALS["llama-2-7b"] + 4 * figures.trained
    assert figures.bases["dense"].nbytes == 32 * 4 * figures.trained


def test_full_protection_of_a_7b_model_fits():
    """The case for the factored and compressed kinds: 0.9 TB dense, a few GB so."""
    bases = plan("llama-2-7b", 32, lora=None).bases
    assert bases["dense"].nbytes > 8e11
    assert bases["factored"].nbytes < bases["dense"].nbytes / 50
    assert bases["compressed"].nbytes < bases["dense"].nbytes / 50
    assert bases["compressed"].step_share < 0.05 < bases["factored"].step_share


def small(tmp_path, model):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("lora", [None, 4])
def test_bytes_equal_those_of_real_bases(tmp_path, lora):
    """Four examples of 9 tokens; the last token of each predicts nothing and is not kept."""
    model = tiny_llama(hidden=48, tied=True)
    name = small(tmp_path, model)
    if lora:
        model = with_lora(model, rank=lora)
    rows = factored(model, safety_batch((6,) * 4, (3,) * 4))[1]
    params = trainable(model)
    assumed = Assumptions(tokens_per_example=8, response_tokens=3, window=4, side_rank=48)
    figures = plan(name, 4, lora=lora, dtype=torch.float32, assumptions=assumed)
    assert figures.trained == sum(p.numel() for p in params)
    real = {}
    for kind in figures.bases:
        empty = empty_basis(kind, params)
        none = torch.zeros(0, 0, dtype=torch.float64)
        real[kind] = gram(empty.window(none, rows), 4, torch.float32)[1].nbytes
    assert figures.bases["dense"].nbytes == real["dense"]
    assert figures.bases["int8"].nbytes == pytest.approx(real["int8"], rel=0.05)
    assert figures.pull_bytes == sum(block.nbytes for block in ElasticPull.at(params).blocks)
    # In the last layer most tokens have no gradient; energy, not r, bounds the other kind's ranks.
    assert 0.7 * figures.bases["factored"].nbytes < real["factored"]
    for kind in ("factored", "compressed"):
        assert real[kind] <= figures.bases[kind].nbytes
    assert 0.25 * figures.bases["compressed"].nbytes < real["compressed"]


LAYERS_OF_THEIR_OWN = {
    "gpt2": tiny_gpt2,
    "falcon": lambda: built(
        "Falcon", hidden_size=48, new_decoder_architecture=True, num_kv_heads=1
    ),
    "tokens of all examples in one row": lambda: built(
        "OPT", hidden_size=48, ffn_dim=768, word_embed_proj_dim=48
    ),
    "tokens in one row behind experts": lambda: built(
        "Qwen2Moe", hidden_size=48, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=48, shared_expert_intermediate_size=384,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS_OF_THEIR_OWN)
def test_layers_without_factors_are_kept_whole(tmp_path, name):
    model = LAYERS_OF_THEIR_OWN[name]()
    rows = factored(model, safety_batch((6,) * 4, (3,) * 4))[1]
    params = trainable(model)
    assumed = Assumptions(tokens_per_example=8, response_tokens=3, window=4, side_rank=48)
    figures = plan(
        small(tmp_path, model), 4, lora=None, dtype=torch.float32, assumptions=assumed
    ).bases
    for kind in ("factored", "compressed"):
        empty = empty_basis(kind, params)
        none = torch.zeros(0, 0, dtype=torch.float64)
        real = gram(empty.window(none, rows), 4, torch.float32)[1].nbytes
        assert figures[kind].nbytes == pytest.approx(real, rel=0.15)


def test_adapters_of_transposed_layers(tmp_path):
    from peft import LoraConfig, get_peft_model

    name = small(tmp_path, tiny_gpt2())
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=4, fan_in_fan_out=True))
    assert plan(name, 4, lora=4).trained == sum(p.numel() for p in trainable(model)) > 0


SPARSE = {"num_experts_per_tok": 2, "head_dim": 8}
ADAPTED = {
    "mixture": ("Qwen3Moe", SPARSE | {"num_experts": 4, "moe_intermediate_size": 48}),
    "mixture that PEFT knows": ("Mixtral", SPARSE | {"num_local_experts": 4}),
    "output layer of another name": ("GPTNeoXJapanese", {}),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_where_peft_puts_them(tmp_path, name):
    from peft import get_peft_model

    architecture, changes = ADAPTED[name]
    model = built(architecture, hidden_size=48, **changes)
    path = small(tmp_path, model)
    model = get_peft_model(model, default_lora(model, 4, 4))
    randomise(p for key, p in model.named_parameters() if "lora_B" in key)
    assumed = Assumptions(tokens_per_example=8, response_tokens=3, window=4, side_rank=48)
    figures = plan(path, 4, lora=4, dtype=torch.float32, assumptions=assumed)
    assert figures.trained == sum(p.numel() for p in trainable(model)) > 0
    rows = factored(model, safety_batch((6,) * 4, (3,) * 4))[1]
    for kind in ("dense", "factored"):
        empty = empty_basis(kind, trainable(model))
        none = torch.zeros(0, 0, dtype=torch.float64)
        real = gram(empty.window(none, rows), 4, torch.float32)[1].nbytes
        assert 0.6 * figures.bases[kind].nbytes < real <= figures.bases[kind].nbytes


def test_shares_and_devices(tmp_path):
    name = small(tmp_path, tiny_llama())
    one, eight = (plan(name, 4, lora=None, world_size=size) for size in (1, 8))
    for field in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert getattr(eight, field) == getattr(one, field) // 8
    assert eight.pull_bytes == one.pull_bytes // 8
    assert eight.bases["dense"].nbytes == one.bases["dense"].nbytes // 8
    # Sharded parameters refuse the other kinds: they stand as beside whole parameters.
    for kind in ("int8", "factored", "compressed"):
        assert eight.bases[kind].nbytes == one.bases[kind].nbytes
    assumed = Assumptions(
        tokens_per_step=100, tokens_per_example=10, response_tokens=2, interval=3, examples=6
    )
    figures = plan(name, 4, lora=None, assumptions=assumed)
    assert figures.refresh_tokens == 60
    assert figures.refresh_share == pytest.approx(60 / 360)
    # Three passes over k numbers a parameter, against three over each token and parameter.
    assert figures.bases["dense"].step_share == pytest.approx(4 / 100)


def test_errors():
    with pytest.raises(ValueError, match="rank=0: expected at least 1"):
        plan("llama-2-7b", 0)
    with pytest.raises(ValueError, match="world_size=0"):
        plan("llama-2-7b", world_size=0)
    with pytest.raises(ValueError, match="interval=0"):
        Assumptions(interval=0)


def test_files_that_are_no_causal_model_are_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"hidden_size": 8}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json: expected one of falcon-40b, .*, a config"):
        plan(str(file))
    file.write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"model=.*[Vv]i[Tt]"):
        plan(str(file))


@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"hidden_act": "none"}])
def test_a_wrong_configuration_is_one_sentence(tmp_path, change):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"model={file}: ") as refused:
        plan(str(file))
    assert "\n" not in str(refused.value)


def test_the_command_prints_every_figure():
    result = CliRunner().invoke(
        app, ["plan", "--model", "qwen3-1.7b", "--rank", "16", "--full", "--world-size", "2"],
        env={"COLUMNS": "120"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "qwen3-1.7b: all parameters, 16 directions, on each of 2 devices" in result.output
    assert "Sharded parameters (FSDP2) take the dense basis only" in result.output
    assert "basis: int8 (whole)" in result.output
    assert "with elastic (dense)" in result.output
    for word in (
        "1,720.6 M",
        "basis: dense",
        "int8",
        "factored",
        "compressed",
        "A refresh: 2 passes",
    ):
        assert word in result.output
    assert "16,384 tokens a step" in result.output
    assert "quantised" not in result.output
    for wrong, words in (
        (("--rank", "0"), "rank=0: expected at least 1"),
        (("--full", "--lora", "8"), "full, lora_rank=8: all parameters or an adapter, not both"),
        (("--full", "--lora-rank", "8"), "full, lora_rank=8: all parameters or an adapter"),
        (("--lora-rank", "0"), "lora_rank=0: expected at least 1"),
    ):
        result = CliRunner().invoke(app, ["plan", "--model", "qwen3-1.7b", *wrong])
        assert result.exit_code == 2
        assert words in result.output
