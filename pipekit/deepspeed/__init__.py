"""The adapter to DeepSpeed: all that renames for it, configures it or mends it."""
