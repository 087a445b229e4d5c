"""Mitigations for benign fine-tuning, compared on equal terms: the same data, seeds and steps."""

import logging

# As it is imported, it looks for a faster CPU kernel on the hub and warns that there is none. Here,
# since the benchmark's own modules import it, also in the processes that `benchmarks.jobs` starts.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
