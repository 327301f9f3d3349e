"""Trials, the training loop, callbacks and loggers."""
