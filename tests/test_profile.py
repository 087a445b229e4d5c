"""The curvature profile: overlap against dense linear algebra, the card, and the command."""

# ruff: noqa: F401, F811
from __future__ import annotations

import json
from importlib.resources import files as package_files

import jsonschema
import pytest
import torch
from test_finetune import arguments, config, files  # the fixture `files` is shared
from tiny_models import randomise, safety_batch, tiny_llama, with_lora
from typer.testing import CliRunner

from safeopt import SafetyProbe
from safeopt.cli.app import app
from safeopt.diagnostics.model_card import section, update_card
from safeopt.diagnostics.overlap import overlap_scores
from safeopt.diagnostics.profile import adapter_change, curvature_profile, full_change
from safeopt.diagnostics.profile_plots import profile_plots
from safeopt.files import write_json
from safeopt.finetuning.finished import load_finished

SCHEMA = json.loads(
    (package_files("safeopt.diagnostics") / "schemas/profile-1.schema.json").read_text()
)
RUN = {
    "config": {"model": "m", "optimizer": "adamw", "learning_rate": 1e-3, "full": False},
    "steps": 8,
    "log": [{"step": 1, "loss": 2.0}, {"step": 8, "loss": 1.5}],
    "measurements": [
        {"step": step, "alignment_loss": 0.1 + 1e-4 * step**4, "predicted": None}
        for step in (0, 2, 4, 8)
    ],
}


def test_overlap_is_that_of_dense_projectors():
    model = tiny_llama(dtype=torch.float64)
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    weights = [dict(model.named_parameters())[name] for name in names]
    probe = SafetyProbe(model, [safety_batch()])
    _, rows = probe.factored(weights)
    torch.manual_seed(1)
    changes = [torch.randn_like(w) for w in weights]
    scores = overlap_scores(rows, names, changes, rank=2, modes=3)
    for score, dense, change in zip(scores, probe.per_example(weights).rows, changes, strict=True):
        flat = dense.flatten(1)
        u = torch.linalg.svd(flat, full_matrices=False)[2][:2]
        inside = (u @ change.flatten()).square().sum() / change.square().sum()
        assert score.share == pytest.approx(float(inside), rel=1e-8)
        left = torch.linalg.svd(dense.mean(0))[0][:, :3]
        kept = (left.T @ change).square().sum() / change.square().sum()
        assert score.energy_kept == pytest.approx(float(kept), rel=1e-8)
        own = torch.linalg.svd(change)[0][:, :3]
        assert score.mode_overlap == pytest.approx(
            float((left.T @ own).square().sum() / 3), rel=1e-8
        )
        assert score.share_random == 2 / change.numel()
        assert score.modes_random == 3 / len(change)
    inside = [rows.block(i).mean(0) for i in range(2)]
    for score in overlap_scores(rows, names, inside, rank=4, modes=3):
        assert score.share > 0.5 > score.share_matched
        assert score.energy_kept == pytest.approx(1, abs=0.2)
    # Where the change has a lower rank than modes are asked for, its own directions count alone.
    row = inside[0][0]
    thin = torch.outer(inside[0] @ row, row)
    thin_score = overlap_scores(rows, names, [thin, torch.zeros_like(inside[1])], modes=8)
    assert thin_score[0].modes_random == 1 / len(thin)
    left = torch.linalg.svd(inside[0])[0][:, 0]
    own = (left @ thin).square().sum() / thin.square().sum()
    assert thin_score[0].mode_overlap == pytest.approx(float(own), rel=1e-8)
    assert thin_score[0].energy_kept == pytest.approx(float(own), rel=1e-8)
    assert thin_score[1].energy_kept is thin_score[1].mode_overlap is None
    norm = model.model.norm.weight  # no matrix: the control is a random direction
    _, vectors = probe.factored([norm])
    top = torch.linalg.svd(vectors.block(0), full_matrices=False)[2][0]
    [vector_score] = overlap_scores(vectors, ["norm.weight"], [top], rank=2)
    assert vector_score.share == pytest.approx(1)
    assert vector_score.share_matched == vector_score.share_random == 2 / norm.numel()
    with pytest.raises(ValueError, match="changes: 1 changes for 2 weights"):
        overlap_scores(rows, names, changes[:1])
    with pytest.raises(ValueError, match="modes=0"):
        overlap_scores(rows, names, changes, modes=0)


def test_a_known_alignment_update_takes_the_place_of_the_mean_gradient():
    model = tiny_llama(dtype=torch.float64)
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    weights = [dict(model.named_parameters())[name] for name in names]
    _, rows = SafetyProbe(model, [safety_batch()]).factored(weights)
    generator = torch.Generator().manual_seed(1)
    changes = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    left = torch.randn(len(weights[0]), generator=generator, dtype=torch.float64)
    update = torch.outer(left, changes[0][0])  # of one direction: so many modes are compared
    plain = overlap_scores(rows, names, changes, modes=3)
    first, second = overlap_scores(rows, names, changes, modes=3, alignment={names[0]: update})
    unit = left / left.norm()
    kept = (unit @ changes[0]).square().sum() / changes[0].square().sum()
    assert first.energy_kept == pytest.approx(float(kept))
    own = torch.linalg.svd(changes[0])[0][:, 0]
    assert first.mode_overlap == pytest.approx(float((unit @ own) ** 2))
    assert first.modes_random == 1 / len(weights[0])
    assert (first.share, second) == (plain[0].share, plain[1])


def test_the_profile_of_adapters_and_of_all_parameters_fits_the_schema():
    adapted = with_lora(tiny_llama())
    change = adapter_change(adapted)
    profile = curvature_profile(change, [safety_batch()], RUN)
    jsonschema.validate(profile, SCHEMA)
    assert profile["onset"]["exponent"] == pytest.approx(4, abs=1e-6)
    assert profile["alignment_loss"]["before"] != profile["alignment_loss"]["after"]
    assert sum(layer["share"] for layer in profile["before"]["layers"]) == pytest.approx(1)
    assert {score["name"].rsplit(".", 1)[1] for score in profile["overlap"]["layers"]} == {
        "q_proj", "v_proj",
    }  # fmt: skip
    # A protected run looks at other examples each time, whose differences are no rise.
    looks = [{**look, "examples": 4} for look in RUN["measurements"]]
    drawn = curvature_profile(change, [safety_batch()], {**RUN, "measurements": looks})
    assert drawn["onset"] is None
    assert "No onset is fitted" in section(drawn)
    assert "No onset is fitted" not in section(profile)
    before, after = tiny_llama(bias=True), tiny_llama(bias=True)
    randomise(after.parameters())
    profile = curvature_profile(full_change(before, after), [safety_batch()], RUN)
    jsonschema.validate(profile, SCHEMA)
    with pytest.raises(ValueError, match="no LoRA layer"):
        adapter_change(tiny_llama())
    with pytest.raises(ValueError, match="not those of the model"):
        full_change(before, tiny_llama())


def test_the_card_has_one_section_however_often_it_is_written(tmp_path):
    profile = curvature_profile(adapter_change(with_lora(tiny_llama())), [safety_batch()], RUN)
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n\nHand-written.\n", encoding="utf-8")
    update_card(card, profile)
    once = card.read_text(encoding="utf-8")
    update_card(card, profile)
    assert card.read_text(encoding="utf-8") == once
    assert once.startswith("---\nlicense: mit\n---\n# Mine\n\nHand-written.\n\n")
    assert once.count("## Safety curvature") == 1
    assert section(profile) in once
    for kept in ("---\na: [1\n---\n# No YAML\n", "# No front matter\n"):
        card.write_text(kept, encoding="utf-8")
        assert update_card(card, profile).read_text(encoding="utf-8").startswith(kept)
    card.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"{card}: not UTF-8 text"):
        update_card(card, profile)
    assert card.read_bytes() == b"\xff"
    fresh = update_card(tmp_path / "new.md", profile).read_text(encoding="utf-8")
    assert fresh.count("## Safety curvature") == 1
    # Somebody has deleted the end mark and written below it.
    card.write_text(section(profile).rsplit("\n", 1)[0] + "\n\nMine.\n", encoding="utf-8")
    for _ in range(2):
        text = update_card(card, profile).read_text(encoding="utf-8")
        assert text.count("\nMine.\n") == 1
        assert text.endswith(section(profile) + "\n")


def test_adapters_other_than_plain_lora_are_refused():
    from peft import LoraConfig, get_peft_model

    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(tiny_llama(), dora)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r'adapter "default" of .*q_proj is not scale·B·A'):
        adapter_change(model)
    assert [p for p in model.parameters() if p.requires_grad] == trained


def test_active_adapters_may_adapt_different_modules():
    from peft import LoraConfig

    model = with_lora(tiny_llama(layers=1))  # q_proj and v_proj
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    randomise(p for name, p in model.named_parameters() if "lora_B" in name)
    change = adapter_change(model)
    plain = dict(tiny_llama(layers=1).named_parameters())
    merged = dict(model.merge_and_unload().named_parameters())
    assert len(change.names) == 3
    for name, difference in zip(change.names, change.changes, strict=True):
        own = name.removeprefix("base_model.model.")
        torch.testing.assert_close(difference, merged[own] - plain[own], atol=1e-6, rtol=1e-5)


def test_a_run_is_profiled_from_its_folder(files, tmp_path, monkeypatch):
    # A profile is of whole refusals: so is the run's loss, for comparison.
    monkeypatch.setattr("safeopt.finetuning.prepare.OPENING", None)
    out = tmp_path / "run"
    CliRunner().invoke(app, arguments(files, out), catch_exceptions=False)
    done = CliRunner().invoke(app, ["profile", "--run", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    profile = json.loads((out / "profile" / "profile.json").read_text())
    jsonschema.validate(profile, SCHEMA)
    report = json.loads((out / "run.json").read_text())
    assert profile["alignment_loss"]["before"] == pytest.approx(
        report["alignment_loss"]["start"], rel=1e-4
    )
    assert profile["alignment_loss"]["after"] == pytest.approx(
        report["alignment_loss"]["end"], rel=1e-4
    )
    assert profile["onset"] is None
    assert "Onset" not in (out / "profile" / "profile.md").read_text(encoding="utf-8")
    names = {path.name for path in (out / "profile").iterdir()}
    assert names == {
        "profile.json", "profile.md", "spectrum.png", "layers.png", "task.png", "alignment.png",
    }  # fmt: skip
    assert "## Safety curvature" in (out / "adapter" / "README.md").read_text(encoding="utf-8")
    wrong = CliRunner().invoke(app, ["profile", "--run", str(files)])
    assert wrong.exit_code == 2
    assert "there is no run.json" in wrong.output.replace("\n", "")
    # Responses that the aligned model would not say: what they measure is no alignment.
    data = ("--safety", str(files / "train.jsonl"), "--out", str(tmp_path / "other"))
    wrong = CliRunner().invoke(app, ["profile", "--run", str(out), *data])
    assert wrong.exit_code == 2
    assert "are unlikely under the model" in wrong.output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("name", "what"), [("none", "there is no such folder"), ("f", "a file")])
def test_a_run_that_is_no_folder_is_named_as_that(name, what, tmp_path):
    (tmp_path / "f").write_text("{}", encoding="utf-8")
    wrong = CliRunner().invoke(app, ["profile", "--run", str(tmp_path / name)])
    assert wrong.exit_code == 2
    assert f"run={tmp_path / name}: " in wrong.output
    assert what in wrong.output


@pytest.mark.parametrize(("opening", "of"), [(4, ", first 4 of a refusal"), (None, "")])
def test_the_plot_says_of_which_tokens_the_loss_is(opening, of):
    """A run looks at the openings that it protects; the profile's own figures are of all tokens."""
    profile = curvature_profile(adapter_change(with_lora(tiny_llama())), [safety_batch()], RUN)
    plot = profile_plots(profile, {**RUN, "opening": opening})["alignment"]
    assert plot.axes[0].get_ylabel() == f"alignment loss (nats a token{of})"
    profile["measurements"] = []  # a run without protection: before and after, by the profile
    plot = profile_plots(profile, {**RUN, "opening": opening})["alignment"]
    assert plot.axes[0].get_ylabel() == "alignment loss (nats a token)"


def test_a_run_that_goes_on_is_not_profiled_by_its_earlier_adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    choices = {"safety": "safety.jsonl", "chat_template": None, "seed": 0, **RUN["config"]}
    unfinished = {**RUN, "config": choices, "measurements": [], "finished": False, "seconds": 1.0}
    write_json(tmp_path / "run.json", unfinished)
    with pytest.raises(FileNotFoundError, match="did not finish"):
        load_finished(tmp_path, None, 8)
    with pytest.raises(ValueError, match="examples=1: "):
        load_finished(tmp_path, None, 1)
