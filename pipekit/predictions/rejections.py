"""Reasons why a layout cannot run, with their numbers; as text, each goes on after "a layout that"."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OutOfMemory:
    """Memory that the fullest rank lacks.

    Attributes:
        needed_bytes: bytes that it needs at its peak.
        available_bytes: bytes that its device has.
        is_lower_bound: whether `needed_bytes` is an estimate that the true need is not below.

    Example:
        >>> str(OutOfMemory(16.15e9, 16e9)), OutOfMemory(18e9, 16e9).lacking_bytes
        ('needs 16.15 GB of 16.00 GB', 2000000000.0)
    """

    needed_bytes: float
    available_bytes: float
    is_lower_bound: bool = False

    @property
    def lacking_bytes(self) -> float:
        """Bytes that are missing."""
        return self.needed_bytes - self.available_bytes

    def __str__(self) -> str:
        needs = "needs at least" if self.is_lower_bound else "needs"
        return f"{needs} {self.needed_bytes / 1e9:,.2f} GB of {self.available_bytes / 1e9:,.2f} GB"


@dataclass(frozen=True)
class TooMany:
    """A number above its limit.

    Example:
        >>> str(TooMany("stages", 16, limit=8, of="layers"))
        'has 16 stages, more than the 8 layers'
    """

    name: str
    number: int
    limit: int
    of: str

    def __str__(self) -> str:
        return f"has {self.number:,} {self.name}, more than the {self.limit:,} {self.of}"


@dataclass(frozen=True)
class NotDivisible:
    """A number that is no multiple of what it is divided among.

    Example:
        >>> str(NotDivisible("attention heads", 25, divisor="tp", by=2))
        'has 25 attention heads, which tp=2 does not divide'
    """

    name: str
    number: int
    divisor: str
    by: int

    def __str__(self) -> str:
        return f"has {self.number:,} {self.name}, which {self.divisor}={self.by} does not divide"


Rejection = OutOfMemory | TooMany | NotDivisible
"""Why a layout cannot run."""
