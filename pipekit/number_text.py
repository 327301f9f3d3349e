"""Numbers as tables and pages show them."""

from __future__ import annotations


def count_text(number: float) -> str:
    """Return a number, of parameters or tokens, with four digits at most.

    Example:
        >>> count_text(461_188_800), count_text(1_557_611_200), count_text(12)
        ('461.2 M', '1.6 B', '12')
    """
    return _scaled(number, {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}) or f"{number:.4g}"


def bytes_text(number: float) -> str:
    """Return a number of bytes in decimal units, as on data sheets.

    Example:
        >>> bytes_text(1_500_000), bytes_text(80e9), bytes_text(0)
        ('1.5 MB', '80.0 GB', '0 B')
    """
    return _scaled(number, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}) or f"{number:.0f} B"


def seconds_text(seconds: float) -> str:
    """Return a time with three digits.

    Example:
        >>> seconds_text(0.0123), seconds_text(1.1), seconds_text(1234.5), seconds_text(0)
        ('12.3 ms', '1.10 s', '1,234 s', '0 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        # What is rounded up to the next unit is of that.
        if seconds >= 0.9995 * size:
            number = seconds / size
            digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
            return f"{number:,.{digits}f} {unit}"
    return f"{seconds:.2g} s"


def days_text(days: float) -> str:
    """Return the time of a long run.

    Example:
        >>> days_text(12.34), days_text(0.34), days_text(0.0001)
        ('12.3 days', '8.2 hours', '8.64 s')
    """
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{24 * days:.1f} hours" if 24 * days >= 1 else seconds_text(86_400 * days)


def _scaled(number: float, units: dict[str, float]) -> str | None:
    """Return a number in the largest of its units that it reaches when it is rounded; None where it reaches none."""
    return next((f"{number / size:,.1f} {unit}" for unit, size in units.items() if number >= 0.99995 * size), None)
