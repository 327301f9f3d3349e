"""What each rank does: builds every contender, then lets them take turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Barrier

from pipekit.schedules import Costs, median_costs
from pipelines.ranks import Say
from pipelines.settings import EmulatedSetting, Setting, plan_table
from pipelines.turns import Contender, Step, System, Turns, take_turns

CALIBRATED_STEPS = 4
"""Steps of 1F1B that are timed to learn what a message and an action cost; the first does not count."""


def measure(
    say: Say, setting: Setting, order: Sequence[Contender], systems: Sequence[System], rounds: int, turn: Barrier
) -> dict[Contender, Turns]:
    """Return what this rank saw of the contenders of the systems that live in its team's processes."""

    def build(contender: Contender) -> Step | None:
        return _build(setting, contender) if contender.system in systems else None

    return take_turns(order, build, rounds, turn, say)


def calibrate(say: Say, setting: EmulatedSetting) -> Costs:
    """Return what the actions of 1F1B cost on this machine, sleep, overhead and messages."""
    from pipelines.ours import build_engine

    say("calibration")
    table = plan_table("1f1b", pp=setting.pp, num_micro_batches=setting.num_micro_batches)
    boundaries = range(0, 2 * setting.pp + 1, 2)
    workload = setting.build_workload()
    engine = build_engine(workload, table=table, boundaries=boundaries, profile=True)
    timelines = []
    for _ in range(CALIBRATED_STEPS):
        engine.train_batch(workload.micro_batches())
        timelines.append(engine.gather_timeline())
    return median_costs(timelines[1:])


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
