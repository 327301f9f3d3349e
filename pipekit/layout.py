"""Layout arithmetic: the coordinates and groups of ranks in pipeline x data x tensor parallelism.

Everything here is computed from three degrees and the order of the axes, without a process group, so a layout can be
printed and tested anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from pipekit.errors import LayoutError

Axis = Literal["pipe", "data", "tensor"]
Order = tuple[Axis, Axis, Axis]

DEFAULT_ORDER: Order = ("pipe", "data", "tensor")
"""Default order of the axes, outermost first."""


@dataclass(frozen=True, order=True)
class Coordinate:
    """Coordinate of a rank: its index along each axis."""

    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """A grid of `pp * dp * tp` ranks.

    Consecutive ranks run along the innermost axis first. By default that is tensor, and pipe is outermost, so the ranks
    that communicate most are closest: tensor-parallel peers have neighbouring ranks, and so share a node.

    Attributes:
        pp: pipeline-parallel degree.
        dp: data-parallel degree.
        tp: tensor-parallel degree.
        order: the axes, outermost first.

    Example:
        >>> layout = Layout(pp=2, dp=2, tp=1)
        >>> layout.coordinate(3)
        Coordinate(pipe=1, data=1, tensor=0)
        >>> layout.groups("data")
        [[0, 1], [2, 3]]
        >>> Layout(pp=2, dp=2, tp=1, order=("data", "pipe", "tensor")).groups("data")
        [[0, 2], [1, 3]]
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    order: Order = DEFAULT_ORDER

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "tp"):
            degree = getattr(self, name)
            if degree < 1:
                raise LayoutError(f"parallel.{name}={degree} must be at least 1")
        order = tuple(self.order)
        if sorted(map(str, order)) != sorted(DEFAULT_ORDER):
            raise LayoutError(
                f"parallel.order={show_order(order)} must name pipe, data and tensor once each, the outermost first; "
                f"for example parallel.order={show_order(DEFAULT_ORDER)}"
            )
        # A list would leave the layout without a hash.
        object.__setattr__(self, "order", order)

    @property
    def world_size(self) -> int:
        """The number of ranks, `pp * dp * tp`."""
        return self.pp * self.dp * self.tp

    def degree(self, axis: Axis) -> int:
        """Degree of parallelism along an axis."""
        return {"pipe": self.pp, "data": self.dp, "tensor": self.tp}[axis]

    def span(self, axis: Axis) -> int:
        """Number of consecutive ranks, from any multiple of it on, that hold whole groups along an axis.

        Example:
            >>> layout = Layout(pp=2, dp=3, tp=4)
            >>> layout.span("tensor"), layout.span("data"), layout.span("pipe")
            (4, 12, 24)
        """
        return prod(self.degree(inner) for inner in self.order[self.order.index(axis) :])

    def coordinate(self, rank: int) -> Coordinate:
        """Return the coordinate of `rank`.

        Raises:
            LayoutError: if `rank` is not in `[0, world_size)`.
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside a layout of {self.world_size} ranks ({self})")
        place: dict[str, int] = {}
        for axis in reversed(self.order):
            rank, place[axis] = divmod(rank, self.degree(axis))
        return Coordinate(**place)

    def rank(self, *, pipe: int = 0, data: int = 0, tensor: int = 0) -> int:
        """Return the rank at a coordinate.

        Raises:
            LayoutError: if the coordinate is outside the layout.
        """
        if not (0 <= pipe < self.pp and 0 <= data < self.dp and 0 <= tensor < self.tp):
            raise LayoutError(f"{Coordinate(pipe, data, tensor)} is outside the layout {self}")
        place = {"pipe": pipe, "data": data, "tensor": tensor}
        rank = 0
        for axis in self.order:
            rank = rank * self.degree(axis) + place[axis]
        return rank

    def groups(self, *axes: Axis) -> list[list[int]]:
        """Return lists of ranks that differ only in their coordinates along `axes`, ordered by their first rank.

        `groups("pipe")` are the pipelines, `groups("data")` the replicas of each stage, and `groups("pipe", "tensor")`
        the ranks that together hold one copy of the model. In a group along one axis, a rank's index is its coordinate.
        The first rank of every group has coordinate 0 along all of `axes`.
        """
        fixed = [axis for axis in DEFAULT_ORDER if axis not in axes]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            coordinate = self.coordinate(rank)
            groups.setdefault(tuple(getattr(coordinate, axis) for axis in fixed), []).append(rank)
        return list(groups.values())

    def __str__(self) -> str:
        degrees = f"pp={self.pp} x dp={self.dp} x tp={self.tp}"
        return degrees if self.order == DEFAULT_ORDER else f"{degrees} in the order {', '.join(self.order)}"


def show_order(order: Sequence[str]) -> str:
    """Return an order of axes as one would type it in a configuration.

    Example:
        >>> show_order(("data", "pipe", "tensor"))
        '[data, pipe, tensor]'
    """
    return f"[{', '.join(map(str, order))}]"


def plan_layout(
    *,
    pp: int,
    tp: int,
    dp: int | Literal["auto"],
    world_size: int | None = None,
    num_devices: int | None = None,
    order: Order = DEFAULT_ORDER,
) -> Layout:
    """Return the layout for `world_size` ranks, or for the devices present if `world_size` is None.

    Args:
        pp, tp, order: as in `Layout`.
        dp: data-parallel degree; `auto` uses all ranks, or all devices.
        world_size: number of processes that a launcher has already started, if any.
        num_devices: number of accelerators present; None on a machine without any, where `auto` means 1.

    Raises:
        LayoutError: if `pp * dp * tp` does not fit the ranks or devices, or `order` does not name each axis once.

    Example:
        >>> print(plan_layout(pp=2, tp=1, dp="auto", world_size=8))
        pp=2 x dp=4 x tp=1
    """
    ranks = world_size if world_size is not None else num_devices
    if dp == "auto":
        if ranks is None:
            return Layout(pp=pp, dp=1, tp=tp, order=order)
        if ranks % (pp * tp) != 0 or ranks < pp * tp:
            what = "processes started" if world_size is not None else "GPUs present"
            instead = "" if world_size is not None else ", or run on the CPU with run.device=cpu"
            raise LayoutError(
                f"parallel.pp={pp} x parallel.tp={tp} does not divide {ranks}, the number of {what}, and pp*tp*dp "
                f"must equal it; {_suggest_pp(ranks, tp)}{instead}"
            )
        return Layout(pp=pp, dp=ranks // (pp * tp), tp=tp, order=order)
    layout = Layout(pp=pp, dp=dp, tp=tp, order=order)
    if world_size is not None and layout.world_size != world_size:
        raise LayoutError(
            f"parallel.pp={pp} x parallel.tp={tp} x parallel.dp={dp} is {layout.world_size}, but "
            f"{world_size} processes were started: pp*tp*dp must equal that; start {layout.world_size}, or "
            "set parallel.dp=auto"
        )
    if world_size is None and num_devices is not None and layout.world_size > num_devices:
        raise LayoutError(
            f"parallel.pp={pp} x parallel.tp={tp} x parallel.dp={dp} needs {layout.world_size} devices, and "
            f"{num_devices} are present; lower one of them, or run on the CPU with run.device=cpu"
        )
    return layout


def _suggest_pp(ranks: int, tp: int) -> str:
    choices = [str(pp) for pp in range(1, ranks // tp + 1) if ranks % (pp * tp) == 0]
    if not choices:
        return f"no parallel.pp fits parallel.tp={tp}; try parallel.tp=1"
    *others, last = choices
    return f"try parallel.pp={', '.join(others) + ' or ' if others else ''}{last}"
