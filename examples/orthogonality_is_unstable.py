"""A gradient that starts orthogonal to the safety subspace does not stay so.

Three systems, from exact to real. For each the alignment loss's rise over training is drawn on
logarithmic axes, and the exponent of its onset is fitted:

(a) an analytic system, where every figure has a closed form: exponent 4;
(b) a small transformer under small-step SGD, as it is and with the safety subspace's part taken out
    of its first gradient for good, so that it starts orthogonal;
(c) SmolLM2 under AdamW + LoRA: the curves that `python -m benchmarks run` has measured.

    python examples/orthogonality_is_unstable.py --out out/instability

SAFEOPT_TINY=1 takes fewer steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import safeopt
from safeopt.diagnostics.plots import curve_plot
from safeopt.diagnostics.scaling_law import OnsetForecast, fit_onset

TINY = os.environ.get("SAFEOPT_TINY") == "1"
ROUNDING = 1e-13  # of the KL divergence in float64
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


class Analytic(nn.Module):
    """Safety curvature λ on a few axes, a task that pushes along another, and a coupling h.

    Alignment example i has the loss ½(a_i·θ − y_i)², y_i = ±1 in pairs: the negative log-likelihood
    of a Gaussian, whose Fisher matrix F is the mean of a_i a_iᵀ and whose rise is ½θᵀFθ exactly.
    The task's loss is g·θ + ½θᵀHθ with H = h(s tᵀ + t sᵀ) and g = t: orthogonal to all a_i, but
    bent towards the safety axis s. Under gradient flow s·θ = (cosh(hτ) − 1)/h at time τ, and after
    n steps of gradient descent ((1 + ηh)ⁿ + (1 − ηh)ⁿ − 2)/2h.
    """

    values = (4.0, 2.0, 1.0)
    coupling = 0.5

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        axes = torch.linalg.qr(noise)[0].T
        safe = axes[: len(self.values)]
        scale = torch.tensor(self.values, dtype=torch.float64).mul(len(self.values)).sqrt()
        self.examples = (scale[:, None] * safe).repeat(2, 1)
        self.targets = torch.cat([torch.ones(3), -torch.ones(3)]).double()
        self.push, self.turn = axes[3], safe[1]
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def alignment(self, model: nn.Module, batch: Any) -> Tensor:
        """Losses of the alignment examples, shape ``(m,)``."""
        index = batch["input_ids"][:, 0]
        return 0.5 * (self.examples[index] @ self.theta - self.targets[index]) ** 2

    def task(self, model: nn.Module, batch: Any) -> Tensor:
        """The task's loss; the batch is always the same."""
        bend = self.coupling * (self.turn @ self.theta) * (self.push @ self.theta)
        return self.push @ self.theta + bend

    def rise(self, steps: int, rate: float) -> float:
        """The exact rise of the alignment loss after so many steps of gradient descent."""
        h = self.coupling
        moved = ((1 + rate * h) ** steps + (1 - rate * h) ** steps - 2) / (2 * h)
        return 0.5 * self.values[1] * moved**2


def analytic() -> dict[str, Any]:
    """(a): diagnose, train by small steps, fit."""
    model, rate = Analytic(), 2e-3
    ids = torch.arange(len(model.examples)).view(-1, 1).expand(-1, 2)
    probe = safeopt.SafetyProbe(model, [{"input_ids": ids, "labels": ids}], loss=model.alignment)
    found = safeopt.diagnose(probe, [0, 0], task_loss=model.task, rank=3)
    exact = math.sqrt(model.values[1]) * model.coupling
    start, steps, curve = probe.value(), 600, [(0, 0.0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model.task(model, None).backward()
        optimizer.step()
        curve.append((step, probe.value() - start))
    fit = fit_onset(*zip(*curve[10:], strict=True), start=0.0)
    law = OnsetForecast(found.figures.coupling, found.figures.drift, rate)
    budget = 0.02
    return {
        "name": "analytic system, gradient descent",
        "curve": curve[10::10],
        "law": [(s, law.rise(s)) for s, _ in curve[10::10]],
        "fit": fit.as_json(),
        "exact_exponent": 4,
        "coupling": {"measured": found.figures.coupling, "exact": exact},
        "overlap": found.figures.overlap,
        "verdict": found.verdict.risk,
        "breach": {
            "budget": budget,
            "forecast": law.forecast_breach(budget).step,
            "measured": next(s for s, rise in curve if rise >= budget),
        },
    }


def small_transformer() -> nn.Module:
    """A Llama of two layers in float64, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def sentences(count: int, first: int, answer: list[int] | None, seed: int) -> dict[str, Tensor]:
    """Prompts of five tokens that begin with ``first``, and answers of three."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(8, 32, (count, 4), generator=generator)
    prompts = torch.cat([torch.full((count, 1), first), prompts], dim=1)
    if answer is None:  # the task: repeat the prompt's last words backwards
        responses = prompts[:, [4, 3, 2]]
    else:
        responses = torch.tensor([answer]).expand(count, -1)
    ids = torch.cat([prompts, responses], dim=1)
    labels = ids.clone()
    labels[:, : prompts.shape[1]] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def transformer() -> list[dict[str, Any]]:
    """(b): a model that has learned to refuse, fine-tuned by small steps on a harmless task."""
    model = small_transformer()
    harmful, task = sentences(4, 1, [3, 4, 5], seed=0), sentences(16, 2, None, seed=1)
    aligning = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):  # it refuses, and half knows the task
        aligning.zero_grad()
        loss = model(**harmful).loss + 0.3 * model(**task).loss
        loss.backward()
        aligning.step()
    aligned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    params = list(model.parameters())
    basis = safety_directions(model, harmful)
    model.zero_grad()
    model(**task).loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
    coordinates = basis.T @ gradient
    pieces = (basis @ coordinates).split([p.numel() for p in params])
    inside = [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]
    overlap = float(coordinates.norm() / gradient.norm())
    runs = []
    for name, removed in (
        ("transformer, SGD, gradient as it is", None),
        ("transformer, SGD, first gradient made orthogonal", inside),
    ):
        model.load_state_dict(aligned)
        curve = descend(model, task, harmful, removed)
        fit = fit_onset(*zip(*curve, strict=True), start=0.0)
        runs.append(
            {
                "name": name,
                "curve": curve,
                "fit": fit.as_json(),
                "overlap": overlap if removed is None else 0.0,
            }
        )
    return runs


def safety_directions(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """An orthonormal basis of all directions that change an answer's logits to first order.

    The Fisher matrix of the model's predictions, which is the curvature of the KL divergence to
    them, lives there and nowhere else. Shape ``(n, r)``.
    """
    answered = batch["labels"][:, 1:] != -100
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1][answered].flatten()
    each = torch.eye(len(logits), dtype=logits.dtype)
    rows = torch.autograd.grad(logits, list(model.parameters()), each, is_grads_batched=True)
    jacobian = torch.cat([row.flatten(1) for row in rows], dim=1)
    _, values, directions = torch.linalg.svd(jacobian, full_matrices=False)
    return directions[values > 1e-10 * values[0]].T


def descend(
    model: nn.Module, task: Any, harmful: Any, removed: list[Tensor] | None
) -> list[tuple[int, float]]:
    """Gradient descent on the task, less a constant part; the KL divergence on the way."""
    probe = safeopt.SafetyProbe(model, [harmful], loss="kl")
    probe.value()  # the reference is the model as it is now
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-4)
    steps = 120 if TINY else 250
    looks = sorted({int(x) for x in np.geomspace(8, steps, 25)})
    curve = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(**task).loss.backward()
        if removed is not None:
            for p, part in zip(model.parameters(), removed, strict=True):
                assert p.grad is not None
                p.grad -= part
        optimizer.step()
        if step in looks and (rise := probe.value()) > ROUNDING:
            curve.append((step, rise))
    return curve


def smollm2() -> list[dict[str, Any]]:
    """(c): the curves in ``benchmarks/results/diagnose-*``, made by AdamW + LoRA."""
    runs = []
    for path in sorted(RESULTS.glob("diagnose-*/result.json")):
        for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
            curve = [(p["step"], p["alignment_loss"]) for p in record["curve"]]
            start = curve[0][1]
            runs.append(
                {
                    "name": f"SmolLM2, AdamW + LoRA, {record['task']}, {record['method']}",
                    "curve": [(step, loss - start) for step, loss in curve[1:]],
                    "fit": fit_onset(*zip(*curve, strict=True)).as_json(),
                }
            )
    return runs


def main() -> None:
    """Run all three and write ``instability.json`` and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("out/instability"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    results = {"analytic": analytic(), "transformer": transformer(), "smollm2": smollm2()}
    (out / "instability.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    first = results["analytic"]
    plots = {"analytic": {"measured": first["curve"], "γ²t⁴/8": first["law"]}}
    for name in ("transformer", "smollm2"):
        plots[name] = {run["name"].split(", ", 2)[-1]: run["curve"] for run in results[name]}
    for name, curves in plots.items():
        if curves:
            figure = curve_plot(curves, "step", "rise of the alignment loss", logarithmic="xy")
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    for run in (first, *results["transformer"], *results["smollm2"]):
        low, high = run["fit"]["exponent_interval"]
        print(
            f"{run['name']}: exponent {run['fit']['exponent']:.2f} ({low:.2f} to {high:.2f}), "
            f"R² {run['fit']['r_squared']:.3f}, best model {run['fit']['best']}"
        )
    print(f"wrote {out}/instability.json and plots")


if __name__ == "__main__":
    main()
