"""An ordinary Trainer run, told before it starts what awaits it, and watched.

Without ``SAFEOPT_MONITOR=prompts.jsonl`` in the environment the callback does nothing.
"""

import os

from common import TINY, place
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from safeopt.integrations.watch import WatchCallback  # new

here = place(__doc__)
os.environ.setdefault("SAFEOPT_MONITOR", here.safety)
watch = WatchCallback(every=2)  # new
trainer = SFTTrainer(
    model=here.model,
    args=SFTConfig(here.out, max_steps=here.steps, report_to="none", use_cpu=TINY),
    train_dataset=load_dataset("json", data_files=here.train, split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8),
    callbacks=[watch],  # new
)
trainer.train()
for check in watch.monitor.history:
    print(f"step {check.step}: alignment loss {check.alignment_loss:.3f}")
