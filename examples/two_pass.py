"""SafetySAM with a second pass for every step, in TRL's SFTTrainer with accumulated gradients."""

from common import TINY, place
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from safeopt.integrations.trainer import SafetyTrainerMixin, protect


class SafetySFTTrainer(SafetyTrainerMixin, SFTTrainer):
    """Repeats the micro-batches of each step at the perturbed parameters."""


here = place(__doc__)
trainer = SafetySFTTrainer(
    model=here.model,
    args=SFTConfig(
        here.out,
        max_steps=here.steps,
        learning_rate=2e-4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
        use_cpu=TINY,
    ),
    train_dataset=load_dataset("json", data_files=here.train, split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8),
)
protect(trainer, here.safety, optimizer="safety-sam", mode="two_pass", rho=0.05)
trainer.train()
trainer.save_model(here.out)
