"""The adapter to DeepSpeed: translates settings and states for it, configures it and fixes its faults."""
