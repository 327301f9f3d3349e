"""Layouts to verify: the configuration's own, and small ones that use each axis alone and with the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import gcd

from pipekit.errors import LayoutError
from pipekit.layout import DEFAULT_ORDER, Layout, Order
from pipekit.models.family import AttentionHeads

MAX_LAYOUTS = 8
"""Number of layouts that are verified at most, unless they are named."""

_TOKEN = re.compile(r"(pp|dp|tp|zero)(\d+)")
_EXAMPLE = "pp2,dp2xzero0,pp2xdp2"


@dataclass(frozen=True)
class LayoutCandidate:
    """A layout to verify.

    Attributes:
        layout: the grid of ranks.
        zero: ZeRO stage.
        is_configured: whether it is the configuration's own, with its own schedule and stages.
    """

    layout: Layout
    zero: int
    is_configured: bool = False

    def __str__(self) -> str:
        return show_degrees(self.degrees)

    @property
    def degrees(self) -> dict[str, int]:
        """Degrees of parallelism and the ZeRO stage, by name."""
        return {"pp": self.layout.pp, "dp": self.layout.dp, "tp": self.layout.tp, "zero": self.zero}


def show_degrees(degrees: Mapping[str, int]) -> str:
    """Return a layout by the degrees that are more than one.

    Example:
        >>> show_degrees({"pp": 2, "dp": 1, "tp": 2, "zero": 1}), show_degrees({"pp": 1, "dp": 1, "tp": 1})
        ('pp=2 x tp=2', 'pp=1')
    """
    return " x ".join(f"{name}={degrees[name]}" for name in ("pp", "dp", "tp") if degrees[name] > 1) or "pp=1"


@dataclass(frozen=True)
class LayoutLimits:
    """Sizes of a model and its batches that decide whether a layout fits.

    Attributes:
        num_layers: length of the list of layers.
        heads: attention heads; None where they are not known.
        sequence_length: tokens of a sequence where ranks keep shards of it; None where they do not.
        global_batch_size: sequences of a step.
        micro_batch_size: sequences that one rank computes at a time.
    """

    num_layers: int
    heads: AttentionHeads | None
    sequence_length: int | None
    global_batch_size: int
    micro_batch_size: int


def plan_candidates(
    num_devices: int, limits: LayoutLimits, *, own: LayoutCandidate | None, zero: int, order: Order = DEFAULT_ORDER
) -> tuple[list[LayoutCandidate], list[tuple[LayoutCandidate, str]]]:
    """Return the layouts to verify, and those that do not fit, each with the reason.

    Each axis comes alone, with each other, and all three together, by twos; then each alone, by as many as there are
    devices, up to four: a pipeline of more than two has a stage that is neither the first nor the last.

    Args:
        num_devices: processes that may run at once.
        limits: sizes that decide which layouts fit.
        own: the configuration's own layout, which comes first; None where it has none.
        zero: the configuration's ZeRO stage; a pipeline has 1 at most.
        order: the axes, outermost first.

    Example:
        >>> sizes = {"sequence_length": 128, "global_batch_size": 8, "micro_batch_size": 2}
        >>> limits = LayoutLimits(12, AttentionHeads(3, 3), **sizes)
        >>> fitting, rejected = plan_candidates(4, limits, own=None, zero=1)
        >>> [str(candidate) for candidate in fitting]
        ['pp=2', 'dp=2', 'pp=2 x dp=2', 'pp=4', 'dp=4']
        >>> [f"{candidate}: {reason}" for candidate, reason in rejected][0]
        'tp=2: parallel.tp=2 does not divide model.num_heads=3, and a rank computes whole heads; try parallel.tp=1'
    """
    chosen: dict[Layout, LayoutCandidate] = {} if own is None else {own.layout: own}
    for layout in _small_layouts(num_devices, order):
        chosen.setdefault(layout, LayoutCandidate(layout, zero_of(layout, zero)))
    fitting, rejected = select_fitting(chosen.values(), num_devices, limits)
    return fitting[:MAX_LAYOUTS], rejected


def select_fitting(
    candidates: Iterable[LayoutCandidate], num_devices: int, limits: LayoutLimits
) -> tuple[list[LayoutCandidate], list[tuple[LayoutCandidate, str]]]:
    """Return the layouts that fit, and those that do not, each with the reason."""
    reasons = [(candidate, reason_against(candidate.layout, num_devices, limits)) for candidate in candidates]
    rejected = [(candidate, reason) for candidate, reason in reasons if reason is not None]
    return [candidate for candidate, reason in reasons if reason is None], rejected


def parse_layouts(text: str, *, zero: int, order: Order = DEFAULT_ORDER) -> list[LayoutCandidate]:
    """Return the layouts that a user has named, as in `pp2,dp2xzero0,pp2xtp2`.

    Args:
        text: layouts with commas between them; degrees, and a ZeRO stage, with `x` between them.
        zero: ZeRO stage of those that name none; a pipeline has 1 at most.
        order: the axes, outermost first.

    Raises:
        LayoutError: if it cannot be read.

    Example:
        >>> [(str(candidate), candidate.zero) for candidate in parse_layouts("pp2,dp4xzero0", zero=1)]
        [('pp=2', 1), ('dp=4', 0)]
    """
    candidates = []
    for name in text.split(","):
        degrees: dict[str, int] = {}
        for token in re.split(r"\s*x\s*", name.strip().replace("=", "")):
            match = _TOKEN.fullmatch(token)
            if match is None or match[1] in degrees:
                raise LayoutError(
                    f"--layouts {text}: {name.strip()!r} is no layout; name degrees of pp, dp and tp, and a ZeRO "
                    f"stage, each once, with x between them, for example --layouts {_EXAMPLE}"
                )
            degrees[match[1]] = int(match[2])
        given = degrees.pop("zero", None)
        layout = Layout(**degrees, order=order)
        candidates.append(LayoutCandidate(layout, zero_of(layout, zero) if given is None else given))
    return list(dict.fromkeys(candidates))


def zero_of(layout: Layout, zero: int) -> int:
    """Return the ZeRO stage of a layout: as configured, and 1 at most under a pipeline."""
    return min(zero, 1) if layout.pp > 1 else zero


def reason_against(layout: Layout, num_devices: int, limits: LayoutLimits) -> str | None:
    """Return the reason why a layout does not fit, or None where it does."""
    if layout.world_size > num_devices:
        return f"needs {layout.world_size} processes, and there are {num_devices} devices; see --devices"
    if layout.pp > limits.num_layers:
        return f"{layout.pp} stages are more than the {limits.num_layers} layers"
    if limits.global_batch_size % (limits.micro_batch_size * layout.dp):
        return (
            f"train.global_batch_size={limits.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={limits.micro_batch_size} x dp={layout.dp}"
        )
    if limits.heads is not None and (fault := limits.heads.fault(layout.tp)):
        return fault.message
    if limits.sequence_length is not None and limits.sequence_length % layout.tp:
        best = gcd(limits.sequence_length, layout.tp)
        return f"{layout.tp} does not divide train.sequence_length={limits.sequence_length}; tp={best} does"
    return None


def _small_layouts(num_devices: int, order: Order) -> Iterator[Layout]:
    largest = min(4, num_devices)
    twos = [degrees for degrees in product((1, 2), repeat=3) if max(degrees) > 1]
    # Alone first, pipelines before replicas before tensor parallelism.
    twos.sort(key=lambda degrees: (sum(degrees), [-degree for degree in degrees]))
    for pp, dp, tp in [*twos, (largest, 1, 1), (1, largest, 1), (1, 1, largest)]:
        layout = Layout(pp=pp, dp=dp, tp=tp, order=order)
        if 1 < layout.world_size <= num_devices:
            yield layout
