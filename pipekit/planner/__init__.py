"""Predicts what a run takes: time and memory of each rank, from what each layer costs."""
