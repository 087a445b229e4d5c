"""`safeopt finetune` as a library: what it checks, what it runs, what it writes."""

from safeopt.finetuning.config import FinetuneConfig
from safeopt.finetuning.prepare import Prepared, prepare
from safeopt.finetuning.run import Outcome, Progress, run

__all__ = ["FinetuneConfig", "Outcome", "Prepared", "Progress", "prepare", "run"]
