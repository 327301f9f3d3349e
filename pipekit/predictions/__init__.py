"""Predictions of time and memory of a run, and the search for its best layout: arithmetic alone."""
