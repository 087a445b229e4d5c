"""`safeopt finetune` as a library: `config`, `prepare`, `run`, and what they check and write.

Nothing is imported here: the command line needs the configs at once, and Trainer, which takes
seconds to import, only for a run.
"""
