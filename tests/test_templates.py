"""What chat templates write around an answer, and which tokens of it are labelled."""

from __future__ import annotations

from datetime import datetime

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks import tiny
from safeopt import safety_examples
from safeopt.data import ChatExample, encode, prompt_ids
from safeopt.losses import IGNORE
from safeopt.safety_examples import answered_alike, as_batches, with_refusals

ASK = {"role": "user", "content": "how do i make a cake"}
SAY = {"role": "assistant", "content": "sure , first take the cake"}
CHAT = ChatExample((ASK, SAY))
THOUGHTS = ("<think>", "</think>")

TURNS = "{% for m in messages %}<|{{ m.role }}|> "
NEXT = "{% if add_generation_prompt %}<|assistant|> "
# A finished turn has a block of thoughts that the generation prompt does not open.
QWEN = (
    TURNS + "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }} <|end|>\n{% endfor %}" + NEXT + "{% endif %}"
)
# The generation prompt opens a block of thoughts that a finished turn does not have.
R1 = (
    TURNS + "{{ m.content.split('</think>')[-1] }} <|end|>\n{% endfor %}"
    "" + NEXT + "<think>\n{% endif %}"
)
# Both have one, and they differ.
NEMOTRON = (
    TURNS + "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }} <|end|>\n{% endfor %}" + NEXT + "<think>\n{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def words(template):
    tokenizer = tiny.tokenizer.__wrapped__()
    tokenizer.add_tokens(list(THOUGHTS), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def pieces(template, split=r" ?\p{L}+|[^\s\p{L}]+|\s+(?!\S)|\s+"):
    """A byte-level tokenizer whose tokens merge over spaces and line breaks."""
    inner = Tokenizer(models.BPE())
    pattern = pre_tokenizers.Split(Regex(split), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    text = [f"{ASK['content']} {SAY['content']} \n\n Answer: I"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(text, trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=400))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", *THOUGHTS], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def parts(tokenizer, example=CHAT):
    """The ids before the labels, and the labelled ones, which are the row's last."""
    row = encode(tokenizer, example)
    start = sum(label == IGNORE for label in row["labels"])
    assert row["labels"] == [IGNORE] * start + row["input_ids"][start:]
    return row["input_ids"][:start], row["input_ids"][start:]


def rendered(tokenizer, messages=(ASK, SAY), **choices):
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, **choices)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("make", [words, pieces])
@pytest.mark.parametrize(
    ("template", "end"),
    [(QWEN, ["<think>", "</think>"]), (R1, []), (NEMOTRON, ["<think>", "</think>"])],
)
def test_labels_begin_where_the_answer_does(make, template, end):
    tokenizer = make(template)
    before, labelled = parts(tokenizer)
    assert tokenizer.decode(labelled).split() == [*SAY["content"].split(), "<|end|>"]
    whole = rendered(tokenizer)
    assert before + labelled == whole[: len(before + labelled)], "not the template's own tokens"
    special = [token for token in tokenizer.convert_ids_to_tokens(before) if token[:1] == "<"]
    assert special[special.index("<|assistant|>") + 1 :] == end
    assert prompt_ids(tokenizer, [ASK]) == before, "the model is asked in another context"


def test_smollm2s_labels_are_all_that_follows_the_generation_prompt():
    tokenizer = words(SMOLLM2)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    prompt = rendered(tokenizer, [ASK], add_generation_prompt=True)
    whole = rendered(tokenizer)
    assert whole[: len(prompt)] == prompt
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    assert parts(tokenizer) == (prompt, whole[len(prompt) : end])
    assert prompt_ids(tokenizer, [ASK]) == prompt


def test_a_prompt_that_merges_with_the_answer_stays_what_the_model_is_given():
    tokenizer = pieces(
        "{% for m in messages %}{{ '\n\nAnswer: ' if m.role == 'assistant' }}{{ m.content }}"
        "{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nAnswer: ' }}{% endif %}"
    )
    prompt = rendered(tokenizer, [ASK], add_generation_prompt=True)
    assert rendered(tokenizer)[: len(prompt)] != prompt
    before, labelled = parts(tokenizer)
    assert before == prompt == prompt_ids(tokenizer, [ASK])
    assert tokenizer.decode(labelled) == f"{SAY['content']}<|end|>"


def test_a_space_that_only_the_finished_turn_has_is_no_part_of_the_prompt():
    tokenizer = pieces(
        "{% for m in messages %}<|{{ m.role }}|>{{ ' ' + m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    before, labelled = parts(tokenizer)
    assert before == rendered(tokenizer, [ASK], add_generation_prompt=True)
    assert before == prompt_ids(tokenizer, [ASK])
    assert tokenizer.decode(labelled) == f" {SAY['content']}<|end|>"


def test_tokenizers_without_offsets_are_divided_too():
    slow = transformers.ByT5Tokenizer()
    assert not slow.is_fast
    slow.chat_template = QWEN.replace(" <|end|>", "</s>")
    before, labelled = parts(slow)
    assert slow.decode(labelled) == f"{SAY['content']}</s>"
    assert before == prompt_ids(slow, [ASK])


def test_an_answer_with_its_own_thoughts_does_not_stand_in_a_second_block():
    tokenizer = words(R1)
    thought = CHAT.answered(f"<think> the cake </think> {SAY['content']}")
    before, labelled = parts(tokenizer, thought)
    assert before == prompt_ids(tokenizer, [ASK])
    assert tokenizer.decode(labelled) == f"{thought.response} <|end|>"


def test_white_space_around_an_answer_is_left_to_the_template():
    tokenizer = words(QWEN.replace("m.content", "m.content | trim"))
    assert parts(tokenizer, CHAT.answered(f"\n {SAY['content']} \n")) == parts(tokenizer)


@pytest.mark.parametrize("template", [tiny.TEMPLATE, QWEN, R1, NEMOTRON])
def test_an_answer_that_was_cut_off_has_no_end_to_learn(template):
    tokenizer = words(template)
    before, labelled = parts(tokenizer)
    cut = CHAT.answered(SAY["content"], finished=False)
    assert parts(tokenizer, cut) == (before, labelled[:-1])
    assert labelled[-1] == tokenizer.eos_token_id


def test_a_cut_answer_that_the_template_changes_has_no_end_either():
    tokenizer = words(R1)
    cut = CHAT.answered("<think> </think> sure", finished=False)
    assert tokenizer.decode(parts(tokenizer, cut)[1]) == cut.response


@pytest.mark.parametrize("tokens", [8, 32])
def test_the_end_of_the_models_own_refusals_is_labelled_only_if_they_have_one(monkeypatch, tokens):
    monkeypatch.setattr(safety_examples, "_OWN_TOKENS", tokens)
    tokenizer = tiny.tokenizer()
    asked = [ChatExample(({"role": "user", "content": tiny.requests(tiny.HARMFUL)[0]},))]
    own = with_refusals(tiny.model(), tokenizer, asked, "prompts")
    refusal = tiny.REFUSAL.split()
    expected = [*refusal, "<|end|>"][:tokens]
    for examples in (own, answered_alike(asked, own)):
        (batch,) = as_batches(tokenizer, examples)
        labelled = batch["labels"][batch["labels"] != IGNORE]
        assert tokenizer.decode(labelled).split() == expected


@pytest.mark.parametrize(
    "today",
    [
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}",
        "{% macro system() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ system() }}",
    ],
)
def test_no_day_but_a_fixed_one_stands_in_the_prompt(monkeypatch, today):
    from transformers.utils import chat_template_utils

    tokenizer = pieces(f"{today} {QWEN}")
    first = parts(tokenizer), prompt_ids(tokenizer, [ASK])
    assert tokenizer.decode(first[1]).startswith("26 Jul 2024 ")

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert tokenizer.decode(rendered(tokenizer)).startswith("02 Jan 2031 ")
    assert (parts(tokenizer), prompt_ids(tokenizer, [ASK])) == first


def test_a_template_that_begins_with_white_space_keeps_it():
    tokenizer = pieces("\n\n  {{ 'a' }}\n" + QWEN)
    before, labelled = parts(tokenizer)
    assert before + labelled == rendered(tokenizer)[: len(before + labelled)]
