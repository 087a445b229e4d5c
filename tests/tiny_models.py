"""Small models and safety batches that all tests share: random weights, a vocabulary of 40."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCAB = 40
PAD, END, USER, ASSISTANT = range(4)
WORDS = ["<pad>", "<end>", "<user>", "<assistant>", *(f"w{i}" for i in range(4, VOCAB))]


def tiny_llama(
    *,
    vocab_size: int = VOCAB,
    hidden: int = 16,
    layers: int = 2,
    tied: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """A random Llama whose weights are large enough for its layers to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias,
        initializer_range=0.2, pad_token_id=PAD, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    if bias:
        randomise(p for name, p in model.named_parameters() if name.endswith("bias"))
    return model


def tiny_gpt2(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random GPT-2: transposed linear layers, biases, learned positions, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.2,
        bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def with_lora(
    model: nn.Module, *, rank: int = 4, random_b: bool = True, seed: int = 0
) -> nn.Module:
    """LoRA on the attention of a tiny Llama; ``random_b`` moves it away from LoRA's start B = 0."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    wrapped = get_peft_model(model, config).to(dtype)
    if random_b:
        randomise(p for name, p in wrapped.named_parameters() if "lora_B" in name)
    return wrapped


def randomise(params, scale: float = 0.2) -> None:
    with torch.no_grad():
        for p in params:
            p.normal_(std=scale)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def safety_batch(
    prompts: tuple[int, ...] = (3, 6, 4, 9, 5),
    responses: tuple[int, ...] = (2, 4, 3, 1, 5),
    *,
    seed: int = 0,
    side: str = "left",
) -> dict[str, Tensor]:
    """Random examples of several lengths; the labels cover the response."""
    generator = torch.Generator().manual_seed(seed)
    length = max(p + r for p, r in zip(prompts, responses, strict=True))
    rows: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.randint(4, VOCAB, (prompt + response,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        missing = length - len(ids)
        for name, tensor, fill in (
            ("input_ids", ids, PAD),
            ("attention_mask", torch.ones_like(ids), 0),
            ("labels", labels, -100),
        ):
            padding = tensor.new_full((missing,), fill)
            parts = [padding, tensor] if side == "left" else [tensor, padding]
            rows[name].append(torch.cat(parts))
    return {name: torch.stack(tensors) for name, tensors in rows.items()}


def single(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One example of a batch, without its padding."""
    kept = batch["attention_mask"][row].bool()
    return {name: tensor[row : row + 1, kept] for name, tensor in batch.items()}


def task_step(model: nn.Module, step: int, *, rows: int = 4, length: int = 8) -> Tensor:
    """Loss and gradients of a random next-token task; ``step`` seeds the batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(4, VOCAB, (rows, length), generator=generator)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def tiny_tokenizer():
    """A word-level tokenizer of the same vocabulary, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w4"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer
