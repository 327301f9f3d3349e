"""What each rank does: builds every contender, then lets them take turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pipelines.ranks import Say
from pipelines.settings import Setting, plan_table
from pipelines.turns import Contender, Step, Turns, take_turns


def measure(say: Say, setting: Setting, contenders: Sequence[Contender], rounds: int) -> dict[Contender, Turns]:
    """Return what this rank saw of each contender."""
    steps = {}
    for contender in contenders:
        say(f"build of {contender}")
        steps[contender] = _build(setting, contender)
    return take_turns(steps, rounds, say)


def _build(setting: Setting, contender: Contender) -> Step:
    # Imported here, in the ranks: the command itself needs neither torch nor DeepSpeed.
    from pipelines.limit import build_limit
    from pipelines.ours import build_ours
    from pipelines.peers import build_deepspeed, build_torch

    workload = setting.build_workload()
    if contender.system == "DeepSpeed":
        return build_deepspeed(workload, partition=contender.partition)
    if contender.system == "torch":
        return build_torch(workload, boundaries=contender.boundaries)
    if contender.system == "limit":
        return build_limit(workload, boundaries=contender.boundaries)
    assert contender.table is not None
    plan = partial(plan_table, contender.schedule, pp=setting.pp, num_micro_batches=setting.num_micro_batches)
    return build_ours(
        workload,
        table=contender.table,
        boundaries=contender.boundaries,
        replan=(lambda costs: plan(costs=costs)) if contender.measures_costs else None,
    )
