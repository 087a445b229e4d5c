"""Mitigations for benign fine-tuning, compared on equal terms: the same data, seeds and steps."""
