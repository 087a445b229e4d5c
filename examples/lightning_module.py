"""Lightning: a protected optimizer from configure_optimizers, and the callback."""

import lightning
import torch
from common import TINY, place
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeopt import ProjectedAdamW, SafetyProbe
from safeopt.data import collate, encode, read_examples
from safeopt.integrations.lightning import SafetyCallback
from safeopt.safety_examples import read_safety_batches


class Module(lightning.LightningModule):
    """A causal language model and its safety examples."""

    def __init__(self, model, batches):
        super().__init__()
        self.model = model
        self.batches = batches

    def training_step(self, batch):
        """The task's loss."""
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """AdamW that keeps the refusals."""
        probe = SafetyProbe(self.model, self.batches, opening=4)
        return ProjectedAdamW(self.model.parameters(), lr=2e-5, probe=probe, basis="int8")


here = place(__doc__)
tokenizer = AutoTokenizer.from_pretrained(here.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(here.model)
batches, _ = read_safety_batches(model, tokenizer, here.safety)
rows = [encode(tokenizer, example, 512) for example in read_examples(here.train)]
loader = torch.utils.data.DataLoader(
    rows, batch_size=2, shuffle=True, collate_fn=lambda some: collate(some, tokenizer.pad_token_id)
)
trainer = lightning.Trainer(
    max_steps=here.steps,
    accelerator="cpu" if TINY else "auto",
    default_root_dir=here.out,
    logger=False,
    callbacks=[SafetyCallback()],
)
trainer.fit(Module(model, batches), loader)
trainer.save_checkpoint(f"{here.out}/last.ckpt")
print(f"alignment loss at the end: {trainer.logged_metrics['alignment_loss']:.3f}")
