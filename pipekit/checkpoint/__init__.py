"""Checkpoints: the manifest and tensor files, reading, averaging, repairing and converting them."""
