"""bitsandbytes: 4-bit bases that keep training after they were evaluated on a CPU.

On processors with AVX512-BF16 a 4-bit layer that runs in evaluation mode without gradients
rewrites its weights for an inference kernel, for good. No gradient passes through that kernel: back
in training, all that lies before such a layer silently gets none. `safeopt.probe` avoids this in
its own passes; Trainer's evaluation, ``generate`` and a user's own do not. `keep_trainable` does.

8-bit and paged optimizers need nothing of this module: `safeopt.safeguard` takes them as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_trainable(model: nn.Module) -> int:
    """Keep 4-bit layers in the form that gradients pass through.

    Call it after loading a quantised model, before anything is evaluated or generated. The numbers
    of evaluation passes on a CPU are then those of training. On a GPU, and for models without
    4-bit layers, it changes nothing.

    Args:
        model: any model.

    Returns:
        The number of 4-bit layers.

    Raises:
        RuntimeError: if layers have been rewritten already; the numbers that they lost with it
            cannot be brought back.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    states = [getattr(layer.weight, "quant_state", None) for layer in layers]
    packed = sum(getattr(state, "packing_format_for_cpu", False) for state in states)
    if packed:
        raise RuntimeError(
            f"model: {packed} of {len(layers)} 4-bit layers were rewritten for inference when the "
            "model was evaluated on this CPU, and pass no gradient on; load it again and call "
            "keep_trainable before the first evaluation"
        )
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
