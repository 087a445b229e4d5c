"""Our optimizers as methods of the benchmark: what they step, what they cost, what they refuse."""

import pytest
import torch
from optimizer_table import copies, equal
from tiny_models import VOCAB, safety_batch, single, tiny_llama, trainable

from benchmarks.config import MethodConfig
from benchmarks.methods import METHODS, Setup
from safeopt import optimizers

OURS = {
    "projected_adamw": {},
    "safety_sam": {},
    "safety_sam two_pass": {"mode": "two_pass", "ascent": "safety", "protection": "damp"},
    "preconditioned_sgd": {"momentum": 0.9, "tau": 1.0},
    "safeguard": {"base": "NAdam", "base_options": {"betas": [0.8, 0.99]}, "mode": "budget"},
    "safeguard 8-bit": {"base": "AdamW8bit", "base_options": {"min_8bit_size": 64}},
}
SHARED = {"held": True, "rank": 4, "trial_examples": 2, "refresh": {"first": 2, "every": 2}}


def method(name, **options):
    model = tiny_llama(layers=1)
    batch, harmless = safety_batch(), safety_batch(seed=1)
    setup = Setup(
        model=model,
        params=trainable(model),
        safety=[single(batch, row) for row in range(5)],
        harmless=[single(harmless, row) for row in range(5)],
        learning_rate=1e-2,
        seed=0,
    )
    config = MethodConfig(name=name.split()[0], **{**SHARED, **OURS.get(name, {}), **options})
    return model, METHODS[config.name](setup, config.options())


class Task:
    """A loss that counts its evaluations and remembers where the first was made."""

    def __init__(self, model, step):
        self.model, self.calls, self.at = model, 0, []
        generator = torch.Generator().manual_seed(step)
        self.ids = torch.randint(4, VOCAB, (4, 8), generator=generator)

    def __call__(self):
        self.calls += 1
        self.at.append(copies(self.model.parameters()))
        return self.model(input_ids=self.ids, labels=self.ids).loss


@pytest.mark.parametrize("name", OURS)
def test_steps_and_costs(name):
    model, rival = method(name)
    before = copies(model.parameters())
    for step in range(4):
        task = Task(model, step)
        with rival.evaluating():
            outside = copies(model.parameters())
        rival.step(task)
        assert task.calls == (2 if "two_pass" in name else 1)
        # Lookahead trains beside the point that is evaluated, once there is a momentum.
        assert equal(task.at[0], outside) == (step == 0 or name != "safety_sam")
        if "two_pass" in name:
            assert not equal(task.at[1], outside)
    assert not equal(model.parameters(), before)
    assert rival.probe.held_count == 5
    assert rival.probe.opening == 4
    measured = rival.cost
    assert (measured.forward, measured.backward) == (
        rival.probe.passes.forward,
        rival.probe.passes.backward,
    )
    assert measured.backward >= 3  # the first look and two refreshes
    assert measured.seconds > 0
    rival.finish()
    with rival.evaluating():
        kept = copies(model.parameters())
    assert equal(model.parameters(), kept)


def test_without_protection_nothing_is_measured():
    model, rival = method("preconditioned_sgd", damping=0)
    rival.step(Task(model, 0))
    rival.finish()
    assert rival.cost.forward == 0


def test_the_second_pass_is_charged_to_safety_and_the_first_is_not(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("benchmarks.methods.base.clock", lambda: clock[0])
    model, rival = method("safety_sam two_pass", refresh={"first": 100, "every": 100})

    class Slow(Task):
        def __call__(self):
            clock[0] += 5.0 if self.calls == 0 else 3.0
            return super().__call__()

    for step in range(2):
        rival.step(Slow(model, step))
    assert rival.cost.seconds == 6.0


def test_every_optimizer_of_the_package_is_a_method():
    classes = {METHODS[name].Options.optimizer_class for name in ("safeguard", *names_of_classes())}
    assert {info.cls for info in optimizers().values()} < classes


def names_of_classes():
    return [name.replace("-", "_") for name in optimizers()]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("safety_sam", {"rnak": 3}, "rnak: no argument of SafetySAM; known are ascent, basis"),
        ("safety_sam", {"base_optimizer": "SGD"}, "base_optimizer: no argument"),
        ("safety_sam", {"protection": "up"}, 'protection="up": expected one of'),
        ("preconditioned_sgd", {"rank": 0}, "rank=0"),
        ("safeguard", {"base": "Nadam"}, "base='Nadam': neither torch.optim nor"),
        ("safeguard", {"lr": 1.0}, "lr: no argument of safeguard"),
        ("safeguard", {"refresh": {"often": 1}}, "refresh"),
    ],
)
def test_wrong_options_name_themselves(name, options, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(name=name, **options)
