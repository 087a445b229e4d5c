"""TRL's DPOTrainer with a LoRA adapter: two lines are new."""

from common import TINY, place
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from safeopt.integrations.trainer import protect  # new

here = place(__doc__)
trainer = DPOTrainer(
    model=here.model,
    args=DPOConfig(
        here.out,
        max_steps=here.steps,
        learning_rate=5e-5,
        per_device_train_batch_size=4,
        save_steps=here.steps // 2,
        report_to="none",
        use_cpu=TINY,
    ),
    train_dataset=load_dataset("json", data_files=here.pairs, split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8),
)
protect(trainer, here.safety)  # new
trainer.train()
trainer.save_model(here.out)
