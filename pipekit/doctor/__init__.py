"""Examination of machines: what a run needs of them, measured, with a verdict and what to do."""
