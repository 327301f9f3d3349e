"""Profiles of training steps: time by action and rank, timelines on one clock, operations by layer, memory, traces."""
