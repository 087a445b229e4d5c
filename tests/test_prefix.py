"""Sharing the common beginning of a batch: the same numbers from fewer tokens."""

from types import SimpleNamespace

import peft
import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama, with_lora
from torch import nn

from safeopt.losses import IGNORE, refusal_nll, response_log_probs
from safeopt.prefix import share_prefix, tokens_run


def batch_of(lengths=(14, 17, 12), beginning=9, response=2, seed=0):
    """Left-padded rows with a common beginning and a response at the end."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(4, 40, (beginning,), generator=generator)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        own = torch.randint(4, 40, (length - beginning,), generator=generator)
        own[0] = 4 + row  # the rows differ right after the beginning
        ids[row, -length:] = torch.cat([start, own])
        mask[row, -length:] = 1
        labels[row, -response:] = ids[row, -response:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("lengths", [(14, 17, 12), (13, 13), (40, 12)])
@pytest.mark.parametrize("lora", [False, True])
def test_losses_and_tokens(lengths, lora):
    model = tiny_llama(dtype=torch.float64)
    model = (with_lora(model) if lora else model).eval()
    batch = batch_of(lengths)
    shared = share_prefix(model, batch)
    assert shared["attention_mask"].shape == (len(lengths), max(lengths))
    assert shared["input_ids"].shape == (len(lengths), max(lengths) - 9)
    with torch.no_grad():
        torch.testing.assert_close(
            refusal_nll(model, shared), refusal_nll(model, batch), rtol=1e-12, atol=1e-12
        )
    assert tokens_run(batch, shared) == sum(lengths) - 9 * (len(lengths) - 1)
    assert tokens_run(batch, batch) == sum(lengths)


def test_padding_of_all_rows_is_left_out():
    model, batch = tiny_llama(dtype=torch.float64).eval(), batch_of()
    wide = {
        name: nn.functional.pad(x, (5, 0), value=IGNORE if name == "labels" else 0)
        for name, x in batch.items()
    }
    shared = share_prefix(model, wide)
    assert shared["input_ids"].shape == (3, 17 - 9)
    with torch.no_grad():
        torch.testing.assert_close(
            refusal_nll(model, shared), refusal_nll(model, batch), rtol=1e-12, atol=1e-12
        )


def test_the_beginning_is_that_of_all_rows():
    """The third row differs from the first two where these are still the same."""
    batch = batch_of((14, 14, 14), beginning=12)
    batch["input_ids"][2, 8:] += 1
    shared = share_prefix(tiny_llama(), batch)
    assert shared["input_ids"].shape[1] == 14 - 8
    batch["input_ids"][2, 7] += 1
    assert "past_key_values" not in share_prefix(tiny_llama(), batch)


@pytest.mark.parametrize("beginning", [9, 15])
def test_without_labels_the_last_token_of_every_row_is_run(beginning):
    """What a row goes on with is asked of its last token, also where all of it is shared."""
    model, ids = tiny_llama(dtype=torch.float64).eval(), torch.arange(4, 20).repeat(2, 1)
    ids[0, :-beginning] = 0
    ids[0, -beginning:] = ids[1, :beginning]
    mask = torch.ones_like(ids)
    mask[0, :-beginning] = 0
    shared = share_prefix(model, {"input_ids": ids, "attention_mask": mask})
    assert shared["input_ids"].shape[1] == 16 - (beginning - 1)
    keys = shared["past_key_values"].layers[0].keys
    assert keys.shape[2] == beginning - 1
    assert not keys.requires_grad
    with torch.no_grad():
        logits = model(**shared).logits[:, -1]
        alone = [
            model(row[keep.bool()][None]).logits[0, -1] for row, keep in zip(ids, mask, strict=True)
        ]
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-12, atol=1e-12)


def test_rows_whose_first_token_has_a_label_share_nothing():
    batch = batch_of((14, 14))
    labelled = {**batch, "labels": batch["input_ids"]}
    assert "past_key_values" not in share_prefix(tiny_llama(), labelled)


def test_the_token_that_predicts_the_first_label_is_not_shared():
    model = tiny_llama(dtype=torch.float64).eval()
    ids = torch.arange(4, 20).repeat(2, 1)
    labels = ids.masked_fill(torch.arange(16) < 10, IGNORE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    shared = share_prefix(model, batch)
    assert shared["input_ids"].shape[1] == 16 - 9
    with torch.no_grad():
        shared_log_probs, targets = response_log_probs(model, shared)
        log_probs, expected = response_log_probs(model, batch)
    assert torch.equal(targets, expected)
    torch.testing.assert_close(shared_log_probs, log_probs, rtol=1e-12, atol=1e-12)


class _NoCache(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        raise AssertionError("nothing was to be run")


class _NoPositions(_NoCache):
    """Takes a cache, but cannot be told where the first token behind padding stands."""

    config = SimpleNamespace()

    def forward(self, input_ids, attention_mask, past_key_values, use_cache, logits_to_keep):
        raise AssertionError("nothing was to be run")


class _NoConfig(_NoPositions):
    """What it attends to is not known."""

    config = None

    def forward(
        self, input_ids, position_ids, attention_mask, past_key_values, use_cache, logits_to_keep
    ):
        raise AssertionError("nothing was to be run")


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (tiny_llama(), batch_of((14,))),
        (tiny_llama(), batch_of(beginning=7)),
        (tiny_llama(), {**batch_of(), "token_type_ids": torch.zeros(3, 17)}),
        (_NoCache(), batch_of()),
        (_NoPositions(), batch_of()),
        (_NoConfig(), batch_of()),
    ],
    ids=["one row", "short beginning", "other entries", "no cache", "no positions", "no config"],
)
def test_what_is_not_shared_is_returned_as_it_is(model, batch):
    shared = share_prefix(model, batch)
    assert shared.keys() == batch.keys()
    assert all(shared[name] is batch[name] for name in batch)


def inner_window():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {"vocab_size": 40, "num_hidden_layers": 2, "head_dim": 8, "num_key_value_heads": 1}
    vision = {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**sizes, **text, "sliding_window": 4},
            vision_config={**sizes, **vision, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4, image_token_index=39, boi_token_index=38, eoi_token_index=37,
        )
    )  # fmt: skip


def windowed(window=4):
    model = tiny_llama()
    model.config.sliding_window = window
    return model


def local_layers():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, window_size=4,
            attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [windowed, local_layers, inner_window])
def test_a_model_with_a_window_is_left_alone(build):
    torch.manual_seed(0)
    model = build().eval()
    assert "past_key_values" not in share_prefix(model, batch_of())


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_model_with_virtual_tokens_is_left_alone(kind):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_llama(layers=1), config).eval()
    assert "past_key_values" not in share_prefix(model, batch_of())


def test_another_architecture():
    model, batch = tiny_gpt2(dtype=torch.float64).eval(), batch_of()
    shared = share_prefix(model, batch)
    assert "past_key_values" in shared
    with torch.no_grad():
        torch.testing.assert_close(
            refusal_nll(model, shared), refusal_nll(model, batch), rtol=1e-12, atol=1e-12
        )
