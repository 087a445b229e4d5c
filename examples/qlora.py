"""QLoRA: a 4-bit base of bitsandbytes, an adapter, and an 8-bit optimizer, protected."""

import torch
from common import TINY, place
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from safeopt.integrations.trainer import protect

here = place(__doc__)
quantised = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32 if TINY else torch.bfloat16,
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(here.model, quantization_config=quantised),
    args=SFTConfig(
        here.out,
        max_steps=here.steps,
        learning_rate=2e-4,
        optim="adamw_bnb_8bit" if TINY else "paged_adamw_8bit",
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=TINY,
    ),
    train_dataset=load_dataset("json", data_files=here.train, split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8),
)
protect(trainer, here.safety, basis="int8")
trainer.train()
trainer.save_model(here.out)
