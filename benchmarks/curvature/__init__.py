"""``python -m benchmarks curvature``: the curvature engine beside its public peers."""
