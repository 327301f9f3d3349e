"""Processes and process groups: joining, leaving, and the model-parallel unit."""
