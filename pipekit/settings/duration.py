"""Durations such as `90s`, `15m`, `11h30m` and `2d`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from pipekit.settings.base import Rule

_UNITS_S = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}
_PATTERN = r"^(\d+(\.\d+)?[dhms])+$"


def parse_duration(text: str) -> float:
    """Parse a duration, and return its seconds.

    Raises:
        ValueError: if it is not a duration, or is zero; the message is the rule.

    Example:
        >>> parse_duration("11h30m"), parse_duration("90s"), parse_duration("1.5m")
        (41400.0, 90.0, 90.0)
    """
    if not re.fullmatch(_PATTERN, text):
        raise ValueError("must be a time of days, hours, minutes and seconds; for example 11h30m, 15m or 90s")
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", text))
    if seconds == 0:
        raise ValueError("must be longer than nothing; for example 15m")
    return seconds


def _check(text: str) -> str:
    parse_duration(text)
    return text


Duration = Annotated[
    str, Rule("a time such as 15m"), AfterValidator(_check), Field(json_schema_extra={"pattern": _PATTERN})
]
"""The type of a key that holds a duration."""
