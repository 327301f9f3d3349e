"""Checkpoints: manifests and tensor files, and reading, averaging, repairing and converting checkpoints."""
