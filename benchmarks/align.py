"""Make SmolLM2 refuse: the adapter that turns the chat model as shipped into the aligned one.

SmolLM2-135M-Instruct refuses nothing, so there is nothing to lose. This trains a LoRA adapter on
refusals of AdvBench prompts (the part set aside for it) and, so that the model goes on answering as
it does, on its own output distribution for harmless prompts, half of which sound harmful.
Everything is seeded. The adapter is part of this repository.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file

from benchmarks.data.datasets import borderline, harmless_train, safety_splits
from benchmarks.data.sources import CHAT_MODEL
from benchmarks.inference import Row
from benchmarks.models import smollm2
from benchmarks.tasks import REFUSAL, refusal_row
from safeopt.data import collate
from safeopt.files import write_whole
from safeopt.losses import IGNORE, ReferenceKL, refusal_nll
from safeopt.refusals import generate

WARM_UP = 5
LEARNING_RATE = 1e-3
REFUSALS, ANSWERS = 8, 8  # examples of each kind in a step
ANSWER_TOKENS = 4  # whether a prompt is refused shows in the first words
ANSWER_WEIGHT = 2.0
RANK, ALPHA = 12, 24
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
# Below, the model reads; a linear classifier on the hidden states here tells harmful from harmless
# better than an adapter that may change how they are read.
LAYERS = range(10, 30)
WEIGHTS = "adapter_model.safetensors"


def align(out: Path, steps: int, seed: int, console: Console) -> None:
    """Train the adapter and write it to ``out`` in bfloat16, with a README.

    Args:
        out: folder of the adapter.
        steps: training steps; the learning rate decays to zero over them.
        seed: of the adapter's initial values and of the order of the examples.
        console: where the progress is shown.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model, tokenizer = smollm2()
    with console.status("the model's own answers to harmless prompts"):
        harmless = harmless_train() + borderline()
        answers = generate(model, tokenizer, harmless, ANSWER_TOKENS, batch_size=40)
    texts = [answer.text for answer in answers]
    answered = [_answer_row(tokenizer, *pair) for pair in zip(harmless, texts, strict=True)]
    refused = [refusal_row(tokenizer, prompt) for prompt in safety_splits().align]
    pad = tokenizer.pad_token_id
    unchanged = ReferenceKL()
    for start in range(0, len(answered), 32):
        with _fast_arithmetic():
            unchanged.cache(model, collate(answered[start : start + 32], pad, side="left"))
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(MODULES),
        layers_to_transform=list(LAYERS),
    )
    adapted = peft.get_peft_model(model, config)
    adapted.train()
    losses = _train(adapted, refused, answered, unchanged, pad, steps, rng, console)
    _save(adapted, out, steps, seed, losses)
    console.print(
        f"wrote {out}: refusal loss {losses[0]:.4f}, KL on harmless prompts {losses[1]:.4f} "
        "(nats per token, last step)"
    )


def _fast_arithmetic() -> torch.autocast:
    """Autocast to bfloat16 on processors that compute with it: nearly twice as fast.

    For one step only: autocast keeps its rounded weights until it ends, whatever becomes of them.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return torch.autocast("cpu", torch.bfloat16, enabled=supported())


def _train(
    model: Any,
    refused: list[Row],
    answered: list[Row],
    unchanged: ReferenceKL,
    pad: int,
    steps: int,
    rng: random.Random,
    console: Console,
) -> tuple[float, float]:
    """Train, and return the last step's losses of the refusals and of the answers."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
    )
    losses = (float("nan"), float("nan"))
    for _ in track(range(steps), "aligning", console=console):
        harmful = collate(rng.sample(refused, REFUSALS), pad, side="left")
        harmless = collate(rng.sample(answered, ANSWERS), pad, side="left")
        with _fast_arithmetic():
            refusal = refusal_nll(model, harmful).mean()
            change = unchanged(model, harmless).mean()
        (refusal + ANSWER_WEIGHT * change).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses = (float(refusal.detach()), float(change.detach()))
    return losses


def _answer_row(tokenizer: Any, prompt: str, answer: str) -> Row:
    """A harmless prompt and the beginning of the model's own answer, which has no end."""
    row = refusal_row(tokenizer, prompt)
    start = next(i for i, label in enumerate(row["labels"]) if label != IGNORE)
    tokens = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return {name: values[:start] + tokens for name, values in row.items()}


def _save(model: Any, out: Path, steps: int, seed: int, losses: tuple[float, float]) -> None:
    # The path of this machine's cache has no business in a file that is shared.
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(out)
    weights = load_file(out / WEIGHTS)
    halved = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(halved, out / WEIGHTS, metadata={"format": "pt"})
    write_whole(out / "README.md", _readme(steps, seed, losses))


def _readme(steps: int, seed: int, losses: tuple[float, float]) -> str:
    return f"""# SmolLM2-135M-Instruct, made to refuse

A LoRA adapter (rank {RANK}, alpha {ALPHA}, on {", ".join(MODULES)} of layers
{LAYERS[0]} to {LAYERS[-1]}, bfloat16) with which the chat model refuses harmful prompts. It exists
so that the benchmark has refusals to lose; it is no safety product. Made by
`python -m benchmarks align --steps {steps} --seed {seed} --out DIR`:

- base: `{CHAT_MODEL.package}` {CHAT_MODEL.version}, `{Path(CHAT_MODEL.members[0]).name}`,
  dequantised to float32
- every step: {REFUSALS} AdvBench prompts of the `align` part with the answer
  "{REFUSAL}" and an end token, and {ANSWERS} harmless prompts
  (`harmless_train.txt` and `borderline_align.txt` in `benchmarks/data/prompts`) with the first
  {ANSWER_TOKENS} tokens of the base model's own greedy answer
- loss: mean token NLL of the refusals, plus {ANSWER_WEIGHT:g} times the mean token
  KL(base model ‖ adapted model) along the answers
- AdamW, learning rate {LEARNING_RATE:g} with {WARM_UP} steps of warm-up and linear decay to 0, no
  weight decay, {steps} steps, bfloat16 autocast where the processor has it
- last step: {losses[0]:.4f} on the refusals, {losses[1]:.4f} on the answers (nats per token)

Licences: base model Apache-2.0, AdvBench MIT.
"""
