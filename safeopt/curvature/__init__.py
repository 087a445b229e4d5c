"""The curvature of the alignment loss: its estimate, its storage and the model built on it."""
