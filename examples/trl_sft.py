"""TRL's SFTTrainer with a LoRA adapter: two lines are new, the rest is an ordinary script."""

from common import TINY, place
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from safeopt.integrations.trainer import protect  # new

here = place(__doc__)
trainer = SFTTrainer(
    model=here.model,
    args=SFTConfig(
        here.out,
        max_steps=here.steps,
        learning_rate=2e-4,
        per_device_train_batch_size=4,
        save_steps=here.steps // 2,
        logging_steps=1,
        report_to="none",
        use_cpu=TINY,
    ),
    train_dataset=load_dataset("json", data_files=here.train, split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8),
)
safety = protect(trainer, here.safety)  # new
trainer.train()
trainer.save_model(here.out)
print(f"alignment loss at the end: {safety.last.alignment_loss:.3f}")
