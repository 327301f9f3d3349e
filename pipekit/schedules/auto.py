"""The best table for measured costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from pipekit.errors import ConfigError
from pipekit.schedules.gpipe import plan_gpipe
from pipekit.schedules.interleaved import plan_interleaved_1f1b
from pipekit.schedules.list_scheduling import Priorities, list_schedule
from pipekit.schedules.one_f_one_b import plan_1f1b
from pipekit.schedules.placement import plan_placement
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.simulate import Costs, simulate
from pipekit.schedules.zb_v import plan_zb_v
from pipekit.schedules.zero_bubble import plan_zb_h1


def plan_auto(
    costs: Costs, *, placement: Sequence[int], num_micro_batches: int, max_in_flight: int | None = None
) -> Schedule:
    """Return the table with the shortest simulated step: list scheduling under several rules, and the fixed schedules.

    It is never worse in simulation than any fixed schedule that has this placement and keeps to the limit.

    Args:
        costs: of each stage.
        placement: the pipeline rank of each stage.
        num_micro_batches: micro-batches of a step.
        max_in_flight: stage activations that a rank may hold; as many as there are stages unless given, which is what
            1F1B's first rank holds.

    Raises:
        ConfigError: if the limit is smaller than the number of stages on a rank, or the costs are of other stages.

    Example:
        >>> slow_last = Costs([1, 1, 1, 2], [1, 1, 1, 2], [1, 1, 1, 2])
        >>> best = plan_auto(slow_last, placement=(0, 1, 2, 3), num_micro_batches=8)
        >>> tables = (plan_1f1b(num_stages=4, num_micro_batches=8), plan_zb_h1(num_stages=4, num_micro_batches=8), best)
        >>> [simulate(table, slow_last).step_time_s for table in tables]
        [57.0, 51.0, 51.0]
    """
    if costs.num_stages != len(placement):
        raise ConfigError(f"costs of {costs.num_stages} stages were given, and the pipeline has {len(placement)}")
    limit = len(placement) if max_in_flight is None else max_in_flight
    pp = max(placement) + 1
    smallest = max(list(placement).count(rank) for rank in range(pp))
    if limit < smallest:
        raise ConfigError(
            f"parallel.max_in_flight={limit} is less than the {smallest} stages of a rank, and each holds at least one "
            f"micro-batch; try parallel.max_in_flight={smallest} or more"
        )
    candidates = [
        schedule
        for schedule in _fixed(tuple(placement), num_micro_batches)
        if all(schedule.peak_in_flight(rank) <= limit for rank in range(pp))
    ]
    eagerness = sorted({0, 1, pp // 2, pp - 1, pp, limit})
    for backward_first, late_stage_first, patience, eager_weights in product(
        (False, True), (True, False), (0.0, 0.25, 1.0), eagerness
    ):
        priorities = Priorities(backward_first, late_stage_first, patience, eager_weights)
        candidates.append(
            list_schedule(
                placement=placement,
                num_micro_batches=num_micro_batches,
                costs=costs,
                max_in_flight=[limit] * pp,
                priorities=priorities,
                name="auto",
            )
        )
    best = min(candidates, key=lambda schedule: simulate(schedule, costs).step_time_s)
    return replace(best, name="auto")


def _fixed(placement: tuple[int, ...], num_micro_batches: int) -> Iterator[Schedule]:
    pp = max(placement) + 1
    stages_per_rank = len(placement) // pp
    if placement == tuple(range(pp)):
        for plan in (plan_1f1b, plan_zb_h1, plan_gpipe):
            yield plan(num_stages=pp, num_micro_batches=num_micro_batches)
    is_looped = placement == plan_placement("looped", pp=pp, stages_per_rank=stages_per_rank)
    if is_looped and stages_per_rank > 1 and num_micro_batches % pp == 0:
        yield plan_interleaved_1f1b(pp=pp, stages_per_rank=stages_per_rank, num_micro_batches=num_micro_batches)
    if placement == plan_placement("v", pp=pp, stages_per_rank=2):
        yield plan_zb_v(pp=pp, num_micro_batches=num_micro_batches)
