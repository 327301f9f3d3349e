"""Optimizers and learning-rate schedules: the tables of both, and the algorithms that torch does not have.

`table.py` and `learning_rates.py` are pure, so that a configuration is checked without torch.
"""
