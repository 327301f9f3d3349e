"""Checks of a machine, a file for each family.

Every function `check_*` of a file here is called with the `Site` and returns rows; nothing else lists it. What it
measures and what it thinks of that are apart: functions `judge_*` are pure.
"""
