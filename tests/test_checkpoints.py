"""Which folders of a run are its checkpoints, and which of them are whole."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from safeopt.finetuning.checkpoints import checkpoints, last_checkpoint


def checkpoint(folder, *, shards=()):
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    for name in shards or ("model.safetensors",):
        save_file({"weight": torch.zeros(2)}, folder / name)
    if shards:
        index = {"weight_map": dict(zip("ab", shards, strict=True))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_only_what_trainer_numbers_is_a_checkpoint(tmp_path):
    for name in ("checkpoint-10", "checkpoint-2", "checkpoint-best-100", "checkpoint-", "runs-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-30").write_text("a file", encoding="utf-8")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_a_missing_shard_is_a_damage(tmp_path):
    whole = checkpoint(
        tmp_path / "checkpoint-1", shards=("model-1.safetensors", "model-2.safetensors")
    )
    assert last_checkpoint(tmp_path) == whole
    last = checkpoint(
        tmp_path / "checkpoint-2", shards=("model-1.safetensors", "model-2.safetensors")
    )
    (last / "model-2.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"model-2\.safetensors is missing; .*continue from checkpoint-1"
    ):
        last_checkpoint(tmp_path)
    (last / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json was cut off or is damaged"):
        last_checkpoint(tmp_path)
