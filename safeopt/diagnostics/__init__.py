"""Know before, watch during, prove after: diagnostics of a fine-tuning run."""
