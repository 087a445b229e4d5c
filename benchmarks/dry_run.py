"""A config at a size at which it runs in seconds on any machine, through the same code.

The model keeps its architecture, the data set its column names, the methods their options; a tiny
model with random weights and the tiny task's rows stand in for what would have to be downloaded.
"""

from __future__ import annotations

from typing import TypeVar

from benchmarks.config import RunConfig

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def shrunk(config: ConfigT) -> ConfigT:
    """The config with two steps, two prompts of each kind and a stand-in for the model."""
    fields = config.model_dump()
    fields["model"]["dry"] = True
    fields["task"] |= {
        "max_length": 64,
        "min_response_tokens": 1,
        "full_length": False,
        "eval_examples": 2,
        "val_examples": min(2, config.task.val_examples),
    }
    fields["evaluation"] |= {
        "every": 1,
        "alignment_prompts": 2,
        "refusal_prompts": 2,
        "over_refusal_prompts": 2,
        "new_tokens": 2,
        "metric_examples": min(1, config.evaluation.metric_examples),
        "metric_tokens": 2,
    }
    fields |= {"batch_size": 2, "steps": 2, "seeds": config.seeds[:1], "threads": 1}
    return type(config).model_validate(fields)
