"""Chat data: the three forms of a line, their errors, and what is labelled."""

from __future__ import annotations

import json

import pytest

from benchmarks import tiny
from safeopt.data import ChatExample, collate, encode, read_examples, safety_batches
from safeopt.losses import IGNORE

ASK = {"role": "user", "content": "how do i make a cake"}
SAY = {"role": "assistant", "content": "sure , first take the cake"}


def write(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": ASK["content"], "response": SAY["content"]},
        {"messages": [ASK, SAY]},
        {"instruction": ASK["content"], "output": SAY["content"]},
    ],
)
def test_all_forms_read_the_same(tmp_path, line):
    path = write(tmp_path / "data.jsonl", line, "", line)
    assert read_examples(path) == [ChatExample((ASK, SAY))] * 2


def test_an_input_follows_its_instruction(tmp_path):
    line = {"instruction": "Sum up.", "input": "A text.", "output": "Text."}
    (example,) = read_examples(write(tmp_path / "data.jsonl", line))
    assert example.prompt[0]["content"] == "Sum up.\n\nA text."


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", r"data.jsonl:2: not valid JSON \(.*character 2\); expected one JSON"),
        ("[", r"data.jsonl:2: not valid JSON \(.*\); expected one JSON object a line"),
        ("[1]", "data.jsonl:2: expected a JSON object"),
        ({"question": "?"}, r"data.jsonl:2: found the keys \['question'\]"),
        ({"prompt": "  ", "response": "x"}, "data.jsonl:2: prompt: expected a text"),
        ({"prompt": "x", "response": 3}, "data.jsonl:2: response: expected a text"),
        ({"prompt": "x"}, "data.jsonl:2: there is no response"),
        ({"messages": []}, "data.jsonl:2: messages: expected a list"),
        ({"messages": [{"role": "user"}]}, "data.jsonl:2: content: expected a text"),
        ({"messages": [ASK, {**SAY, "role": "gpt"}]}, 'data.jsonl:2: messages: role="gpt"'),
        ({"messages": [SAY]}, "data.jsonl:2: messages: found the roles assistant"),
        ({"messages": [ASK]}, "data.jsonl:2: there is no response"),
        ({"prompt": "x", "response": None}, "data.jsonl:2: there is no response"),
        ({"instruction": "x", "input": ["y"], "output": "z"}, "data.jsonl:2: input: expected a"),
        ("[" * 100_000, r"data.jsonl:2: not valid JSON \(nested too deeply\)"),
        (
            r'{"prompt": "a \ud83d b", "response": "y"}',
            r"data.jsonl:2: prompt: half of a surrogate pair, '\\ud83d', at character 3",
        ),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, words):
    good = {"prompt": "x", "response": "y"}
    with pytest.raises(ValueError, match=words):
        read_examples(write(tmp_path / "data.jsonl", good, line))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="it is no regular file"):
        read_examples(tmp_path)
    with pytest.raises(ValueError, match="is empty"):
        read_examples(write(tmp_path / "empty.jsonl", "", ""))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "x", "response": "y"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:2: not UTF-8"):
        read_examples(path)


@pytest.mark.parametrize("missing", [{}, {"response": None}, {"response": " "}])
def test_safety_prompts_need_no_response(tmp_path, missing):
    path = write(tmp_path / "safety.jsonl", {"prompt": "x", **missing})
    assert read_examples(path, need_response=False)[0].response is None


@pytest.mark.parametrize("missing", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_an_instruction_needs_no_input(tmp_path, missing):
    line = {"instruction": ASK["content"], **missing, "output": SAY["content"]}
    path = write(tmp_path / "data.jsonl", line)
    assert read_examples(path) == [ChatExample((ASK, SAY))]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [ASK, SAY]}), encoding="utf-8-sig")
    assert read_examples(path) == [ChatExample((ASK, SAY))]
    path.write_text("", encoding="utf-8-sig")
    with pytest.raises(ValueError, match="the file is empty"):
        read_examples(path)


def test_two_halves_of_a_surrogate_pair_are_one_character(tmp_path):
    path = write(tmp_path / "data.jsonl", r'{"prompt": "a \ud83d\ude00", "response": "y"}')
    assert read_examples(path)[0].prompt[0]["content"] == "a \N{GRINNING FACE}"


def test_only_the_response_and_its_end_are_labelled():
    words = tiny.tokenizer()
    row = encode(words, ChatExample((ASK, SAY)))
    labelled = [
        token
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != IGNORE
    ]
    assert words.decode(labelled) == f"{SAY['content']} <|end|>"
    assert encode(words, ChatExample((ASK, SAY)), 5)["input_ids"] == row["input_ids"][:5]


def test_no_chat_template_is_an_error():
    words = tiny.tokenizer.__wrapped__()
    words.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode(words, ChatExample((ASK, SAY)))
    words.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(ValueError, match=r"chat template: it does not take .* roles user"):
        encode(words, ChatExample((ASK, SAY)))


def test_a_response_under_another_name_is_told_by_its_keys(tmp_path):
    path = write(tmp_path / "data.jsonl", {"instruction": "x", "context": "", "response": "y"})
    with pytest.raises(
        ValueError, match=r"no response .* \['context', 'instruction', 'response'\]"
    ):
        read_examples(path)


def test_a_template_that_takes_no_system_message_is_an_error():
    words = tiny.tokenizer.__wrapped__()
    words.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match=r"the roles user \(no system\).* begins 'how do i make"):
        encode(words, ChatExample((ASK, SAY)))


def test_a_template_that_rewrites_earlier_turns_still_labels_the_response():
    """Reasoning models' templates drop what the generation prompt holds from finished turns."""
    words = tiny.tokenizer.__wrapped__()
    words.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}first {% endif %}"
    )
    row = encode(words, ChatExample((ASK, SAY)))
    labelled = [label for label in row["labels"] if label != IGNORE]
    assert words.decode(labelled) == f"{SAY['content']} <|end|>"
    assert row["input_ids"][-len(labelled) :] == labelled


def test_batches_are_padded_on_the_side_asked_for():
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    assert collate(rows, 0)["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    left = collate(rows, 0, side="left")
    assert left["labels"].tolist() == [[IGNORE, 2, 3], [IGNORE, IGNORE, 4]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "responses: 1 for 2 prompts", {"responses": ["no"]}),
        (TypeError, "prompts='ab': expected a list of texts", {"prompts": "ab"}),
        (TypeError, "responses='no': expected a list of texts", {"responses": "no"}),
        (ValueError, r"prompts\[1\]: .* found 3", {"prompts": ["a", 3]}),
        (ValueError, r"responses\[0\]: .* found ' '", {"responses": [" ", "no"]}),
        (ValueError, "batch_size=0: expected a number of examples", {"batch_size": 0}),
        (ValueError, "batch_size=-1: expected a number of examples", {"batch_size": -1}),
        (ValueError, "batch_size=2.5: expected a number of examples", {"batch_size": 2.5}),
    ],
)
def test_bad_arguments_of_safety_batches_are_named(error, message, arguments):
    good = {"prompts": ["a", "b"], "responses": ["no", "no"]}
    with pytest.raises(error, match=message):
        safety_batches(tiny.tokenizer(), **{**good, **arguments})
