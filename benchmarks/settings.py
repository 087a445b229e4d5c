"""The parts of a config that say what is trained on what, and how it is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

TINY = "tiny"
ALIGNED = "smollm2-aligned"
BUILT_IN = ("codeio", "gsm8k", "summaries", "tiny")


class Strict(BaseModel):
    """A part whose settings are all known, and fixed once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Strict):
    """The model that is fine-tuned.

    Attributes:
        name: ``smollm2-aligned``, ``tiny``, or any hub name, local folder or GGUF file.
        dtype: of its parameters.
        unaligned: the same for the model from before its alignment, which Safe LoRA needs. The two
            built-in models have one.
        architecture: one of `safeopt.plan.architectures`, for a dry run.
        dry: a model of the same architecture, but tiny and with random weights, stands in for it.
    """

    name: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    unaligned: str | None = None
    architecture: str | None = None
    dry: bool = False


class TaskConfig(Strict):
    """The harmless task.

    Attributes:
        name: ``codeio``, ``gsm8k``, ``summaries``, ``tiny``, a file of JSON lines, or a data set on
            the hub.
        subset: of a data set on the hub.
        split: likewise.
        prompt: column of the prompts; without it a row has one of the forms of `safeopt.data`.
        response: column of the responses.
        instruction: stands before every prompt of the column.
        max_length: tokens at which an example is cut off.
        min_response_tokens: examples with a shorter response within the cut are left out.
        full_length: leave out examples shorter than ``max_length``, so that all batches are equal.
        eval_examples: held-out examples on which the task loss is measured.
        val_examples: others, on which it is measured with the split ``val``; 0 for the same.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    prompt: str | None = None
    response: str | None = None
    instruction: str = ""
    max_length: PositiveInt = 128
    min_response_tokens: PositiveInt = 1
    full_length: bool = False
    eval_examples: PositiveInt = 8
    val_examples: NonNegativeInt = 0

    @field_validator("name")
    @classmethod
    def _has_a_source(cls, name: str) -> str:
        if name not in BUILT_IN and "/" not in name and not name.endswith(".jsonl"):
            raise ValueError(
                f"expected {', '.join(BUILT_IN)}, a file of JSON lines (.jsonl), or owner/name on "
                "the hub"
            )
        return name

    @model_validator(mode="after")
    def _columns(self) -> TaskConfig:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response: name both columns or neither")
        if self.name in BUILT_IN and (self.prompt or self.subset or self.instruction):
            raise ValueError(
                "prompt, response, subset and instruction are for other data than "
                f"{', '.join(BUILT_IN)}"
            )
        return self


class LoraConfig(Strict):
    """Low-rank adapters, as in PEFT."""

    r: PositiveInt = 8
    alpha: PositiveInt = 16
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)


class EvaluationConfig(Strict):
    """How a run is measured.

    Attributes:
        every: steps between two points of the curve.
        split: HarmBench's ``val`` for choosing hyperparameters, ``test`` for published figures.
        alignment_prompts: harmful prompts on which the alignment loss is measured.
        refusal_prompts: harmful prompts that are answered at the start and the end.
        over_refusal_prompts: harmless prompts that look harmful, likewise.
        new_tokens: length of an answer; a refusal shows in its first words.
        harmless_kl: measure KL(π_θ₀ ‖ π_θ) on the aligned model's answers to the harmless prompts.
        separation: measure how well the refusal's likelihood tells harmful from harmless prompts.
        per_prompt: keep what each prompt gives for the alignment loss and the separation, for
            intervals; a sweep always does.
        metric_examples: held-out task examples that are answered for the task's metric; 0 for none.
        metric_tokens: length of such an answer.
    """

    every: PositiveInt = 4
    split: Literal["val", "test"] = "test"
    alignment_prompts: PositiveInt = 20
    refusal_prompts: PositiveInt = 64
    over_refusal_prompts: PositiveInt = 32
    new_tokens: PositiveInt = 9
    harmless_kl: bool = False
    separation: bool = False
    per_prompt: bool = False
    metric_examples: NonNegativeInt = 0
    metric_tokens: PositiveInt = 64
