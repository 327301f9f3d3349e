"""The `auto` schedule: the best table for measured costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from pipekit.errors import ConfigError
from pipekit.schedules.action import Action
from pipekit.schedules.fill_bubbles import fill_bubbles
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
    """Return the table with the shortest simulated step among the tables of several methods.

    The methods are the fixed schedules; the fixed schedules with weight gradients moved to where a rank would wait;
    1F1B with more forwards ahead, likewise; and list scheduling under several rules. In simulation the step is never
    longer than that of any fixed schedule with this placement that keeps to the limit.

    Args:
        costs: costs of each stage.
        placement: the pipeline rank of each stage.
        num_micro_batches: number of micro-batches per step.
        max_in_flight: largest number of stage activations that a rank may hold; by default the number of stages, as
            on the first rank of 1F1B.

    Raises:
        ConfigError: if the limit is smaller than the number of stages on a rank, or the costs are for another number of
            stages.

    Example:
        >>> slow_messages = Costs.uniform(4, transfer_s=0.5)
        >>> h1 = plan_zb_h1(num_stages=4, num_micro_batches=8)
        >>> best = plan_auto(slow_messages, placement=(0, 1, 2, 3), num_micro_batches=8, max_in_flight=8)
        >>> [simulate(table, slow_messages).step_time_s for table in (h1, best)]
        [33.0, 28.5]
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
    shortest_s = _shortest_step_s(costs, placement, num_micro_batches)
    best: tuple[float, Schedule] | None = None
    for schedule in _candidates(costs, tuple(placement), num_micro_batches, limit):
        if any(schedule.peak_in_flight(rank) > limit for rank in range(pp)):
            continue
        step_time_s = simulate(schedule, costs).step_time_s
        if best is None or step_time_s < best[0]:
            best = step_time_s, schedule
        # Nothing can be better, except by rounding.
        if best[0] <= shortest_s * (1 + 1e-9):
            break
    assert best is not None, "list scheduling keeps to every limit"
    return replace(best[1], name="auto")


def _shortest_step_s(costs: Costs, placement: Sequence[int], num_micro_batches: int) -> float:
    """Lower bound of a step's time in seconds: a rank's wait for its first input, and then all its work."""
    arrival_s = 0.0
    totals: dict[int, float] = {}
    for stage, rank in enumerate(placement):
        if stage > 0:
            crosses = placement[stage - 1] != rank
            arrival_s += costs.of(Action(stage - 1, "F", 0)) + (costs.transfer_s if crosses else 0.0)
        # A whole backward is the least: it has the overhead of one action.
        work_s = num_micro_batches * (costs.of(Action(stage, "F", 0)) + costs.of(Action(stage, "B", 0)))
        totals[rank] = totals.get(rank, arrival_s) + work_s
    return max(totals.values())


def _candidates(costs: Costs, placement: tuple[int, ...], num_micro_batches: int, limit: int) -> Iterator[Schedule]:
    pp = max(placement) + 1
    fixed = list(_fixed(placement, num_micro_batches))
    yield from fixed
    orders = [schedule for schedule in fixed if schedule.name in ("zb-h1", "zb-v", "interleaved-1f1b")]
    if placement == tuple(range(pp)):
        orders += [_more_ahead(pp, num_micro_batches, slope, limit) for slope in (1.5, 2.0, 3.0)]
    everything = [len(placement) * num_micro_batches] * pp
    for order, hold_back, patience in product(orders, (range(pp), everything), (0.0, 0.5, 1.0)):
        filled = fill_bubbles(order, costs, max_in_flight=limit, hold_back=hold_back, patience=patience, name="auto")
        if filled is not None:
            yield filled
    eagerness = sorted({0, pp // 2, pp - 1, limit})
    for backward_first, late_stage_first, patience, eager_weights in product(
        (False, True), (True, False), (0.0, 0.25), eagerness
    ):
        yield list_schedule(
            placement=placement,
            num_micro_batches=num_micro_batches,
            costs=costs,
            max_in_flight=[limit] * pp,
            priorities=Priorities(backward_first, late_stage_first, patience, eager_weights),
            name="auto",
        )


def _more_ahead(pp: int, num_micro_batches: int, slope: float, limit: int) -> Schedule:
    """Return 1F1B with `slope` forwards ahead for each stage behind; ZB-H2 has 2 of them."""
    ranks = []
    for stage in range(pp):
        num_ahead = min(num_micro_batches, limit, 1 + round((pp - 1 - stage) * slope))
        actions = [Action(stage, "F", micro_batch) for micro_batch in range(num_ahead)]
        for micro_batch in range(num_micro_batches):
            actions.append(Action(stage, "B", micro_batch))
            if num_ahead + micro_batch < num_micro_batches:
                actions.append(Action(stage, "F", num_ahead + micro_batch))
        ranks.append(tuple(actions))
    return Schedule("ahead", num_micro_batches, tuple(ranks))


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
