"""Checks of a machine, one file per family.

Every function `check_*` in these files is found by its name, takes the `Site` and returns rows. Measurements and
verdicts are separate: functions `judge_*` are pure.
"""
