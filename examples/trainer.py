"""Hugging Face Trainer, all parameters."""

from common import TINY, place
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from safeopt.integrations.trainer import protect

here = place(__doc__)
tokenizer = AutoTokenizer.from_pretrained(here.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token


def encode(line):
    """One conversation as token ids."""
    text = tokenizer.apply_chat_template(line["messages"], tokenize=False)
    return tokenizer(text, truncation=True, max_length=512, add_special_tokens=False)


rows = load_dataset("json", data_files=here.train, split="train")
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(here.model),
    args=TrainingArguments(
        here.out,
        max_steps=here.steps,
        learning_rate=2e-5,
        per_device_train_batch_size=4,
        save_steps=here.steps // 2,
        report_to="none",
        use_cpu=TINY,
    ),
    train_dataset=rows.map(encode, remove_columns=rows.column_names),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
protect(trainer, here.safety)
trainer.train()
trainer.save_model(here.out)
