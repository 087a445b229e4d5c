"""Models by name: folders, GGUF files, and what cannot be loaded."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import T5Config

from safeopt.data import ChatExample, encode, pad_id
from safeopt.models import _check_complete, check_readable, load_causal_lm

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENS = ["<pad>", "<end>", "<user>", "<assistant>", *(chr(97 + i) for i in range(26)), "ab"]


def write_gguf(model, path):
    """The model as llama.cpp's converter writes it: other names, rotary rows in another order."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    unused = [f"<unused{i}>" for i in range(config.vocab_size - len(TOKENS))]
    writer.add_token_list(TOKENS + unused)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control] * 4 + [normal] * (config.vocab_size - 4))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        for part, count in heads.items():
            if part in name:
                halves = tensor.view(count, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path):
    original = tiny_llama().eval()
    write_gguf(original, tmp_path / "tiny.gguf")
    model, tokenizer = load_causal_lm(str(tmp_path / "tiny.gguf"))
    ids = torch.arange(4, 20)[None]
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    messages = ({"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"})
    assert encode(tokenizer, ChatExample(messages))["input_ids"] == [2, 30, 1, 3, 6, 1]
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_causal_lm(str(tmp_path / "saved"))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model=none\.gguf: there is no such file"):
        load_causal_lm("none.gguf")
    (tmp_path / "text.gguf").write_bytes(b"not a GGUF file")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    T5Config().save_pretrained(tmp_path / "t5")
    for name, words in {
        "text.gguf": "GGUF magic",
        "adapter": "holds an adapter; merge it",
        "empty": "Unrecognized model",
        "t5": "type t5 does not continue a text",
    }.items():
        with pytest.raises(ValueError, match=f"model=.*{name}.*{words}"):
            load_causal_lm(str(tmp_path / name))


@pytest.fixture
def saved(tmp_path):
    """A folder with a model and its tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


DAMAGES = {
    "cut off": lambda whole: whole[: len(whole) // 2],
    "a pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\nsize 12345\n",
    "empty": lambda whole: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_one_sentence(damage, saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(DAMAGES[damage](weights.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot be read .*Git LFS; fetch it again") as refused:
        load_causal_lm(str(saved))
    assert str(refused.value).startswith(f"model={saved}: ")
    assert "\n" not in str(refused.value)


def test_a_wrong_configuration_is_one_sentence(saved):
    settings = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    for change in ({"num_attention_heads": 0, "head_dim": None}, {"hidden_act": "none"}):
        (saved / "config.json").write_text(json.dumps(settings | change), encoding="utf-8")
        with pytest.raises(ValueError, match=f"model={saved}: expected the folder") as refused:
            load_causal_lm(str(saved))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("pad", "end", "kept"),
    [
        ("<pad>", "<end>", "<pad>"),
        (None, "<end>", "<end>"),
        ("[new]", "<end>", "<end>"),  # the model has no embedding for it
        (None, None, None),
        ("[new]", None, None),
    ],
)
def test_a_tokenizer_pads_with_what_the_model_knows(saved, pad, end, kept):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, end
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(saved)
    loaded = load_causal_lm(str(saved))[1]
    assert loaded.pad_token == kept
    assert pad_id(loaded) == (0 if kept is None else loaded.convert_tokens_to_ids(kept))


def test_what_a_model_has_no_embeddings_for_is_refused():
    llama, gpt2 = tiny_llama(), tiny_gpt2()
    check_readable(llama, [[VOCAB - 1], [4] * 500], "text")  # its positions are computed
    check_readable(gpt2, [[4] * 64], "text")
    with pytest.raises(ValueError, match=f"text has the token {VOCAB}, .* below {VOCAB} only"):
        check_readable(llama, [[4], [VOCAB]], "text")
    for length, room in ((65, 0), (33, 32)):
        with pytest.raises(ValueError, match="text takes 65 tokens, and the model has 64 pos"):
            check_readable(gpt2, [[4] * length], "text", room)


def test_weights_of_other_shapes_are_named(saved):
    settings = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    settings["intermediate_size"] += 4
    (saved / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"down_proj\.weight has the shape \(.*asks for"
    ) as refused:
        load_causal_lm(str(saved))
    assert str(refused.value).startswith(f"model={saved}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tied", "dropped", "lacking"),
    [
        (False, "layers.1.mlp.up_proj", r"model\.layers\.1\.mlp\.up_proj\.weight, which"),
        (False, "lm_head", r"lm_head\.weight, which"),
        (True, "embed_tokens", r"lm_head\.weight, model\.embed_tokens\.weight, which"),
        (False, "proj", r"mlp\.gate_proj\.weight, …, which"),
        (True, "lm_head", None),  # never there
    ],
)
def test_weights_that_are_missing_are_named_and_not_made_up(tmp_path, tied, dropped, lacking):
    tiny_llama(tied=tied).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if dropped not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if lacking is None:
        load_causal_lm(str(tmp_path))
        return
    with pytest.raises(
        ValueError, match=rf"its weights lack .*{lacking} would be made up"
    ) as error:
        load_causal_lm(str(tmp_path))
    assert str(error.value).startswith(f"model={tmp_path}: ")


def test_buffers_that_are_missing_are_named():
    """Of a mixture of experts the router's corrections are learned, but no parameters."""
    model = torch.nn.Module()
    model.register_buffer("correction", torch.zeros(2))
    _check_complete(model, set())
    with pytest.raises(ValueError, match="its weights lack correction, which"):
        _check_complete(model, {"correction"})
