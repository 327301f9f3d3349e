"""ZB-V: two stages a rank, placed in a V, and weight gradients wherever a rank would be idle."""

from __future__ import annotations

from itertools import product

from pipekit.schedules.list_scheduling import Priorities, list_schedule
from pipekit.schedules.placement import plan_placement
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.simulate import Costs, simulate


def plan_zb_v(*, pp: int, num_micro_batches: int) -> Schedule:
    """Return the ZB-V table: `2 * pp` stages, and the first and the last of them on the first rank.

    The first rank has the loss, so that its backward starts at once, and a rank waits for little but its first input:
    with equal costs and many micro-batches the bubble is that of one stage's forward for each rank but one. No
    rank holds more than `2 * pp` stage activations, which is what `pp` of 1F1B's stages, twice as long, hold.

    Found by list scheduling with equal costs under that limit.

    Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 6; Qi et al. 2024, "Pipeline Parallelism with
    Controllable Memory".

    Example:
        >>> print(plan_zb_v(pp=2, num_micro_batches=1))
        0F0 3F0 3I0 3W0 0I0 0W0
        1F0 2F0 2I0 1I0 2W0 1W0
    """
    placement = plan_placement("v", pp=pp, stages_per_rank=2)
    costs = Costs.uniform(2 * pp)
    best: tuple[float, Schedule] | None = None
    for backward_first, eager_weights in product((False, True), (max(pp - 1, 0), pp, pp // 2)):
        schedule = list_schedule(
            placement=placement,
            num_micro_batches=num_micro_batches,
            costs=costs,
            max_in_flight=[2 * pp] * pp,
            priorities=Priorities(backward_first, late_stage_first=True, patience=0.0, eager_weights=eager_weights),
            name="zb-v",
        )
        step_time_s = simulate(schedule, costs).step_time_s
        if best is None or step_time_s < best[0]:
            best = step_time_s, schedule
    assert best is not None
    return best[1]
