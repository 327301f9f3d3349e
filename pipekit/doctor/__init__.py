"""Checks of machines before a run: measurements with a verdict and a remedy."""
