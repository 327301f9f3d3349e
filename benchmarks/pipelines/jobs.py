"""Jobs of the ranks: to build every contender and let them take turns, and to measure a model's layers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from threading import Barrier

from pipekit.schedules import Costs, median_costs
from pipelines.profiled import ProfiledModel
from pipelines.ranks import RankPool, Say
from pipelines.settings import EmulatedSetting, Setting, max_in_flight, plan_table
from pipelines.turns import Contender, Results, Step, System, Turns, combine, take_turns

CALIBRATED_STEPS = 4
"""Steps of 1F1B that are timed to learn what a message and an action cost; the first does not count."""


def run_setting(pool: RankPool, setting: Setting, order: Sequence[Contender], rounds: int) -> Results:
    """Return what the contenders of a setting were measured at.

    Raises:
        RankError: if a rank fails.
    """
    turn = pool.barrier(setting.pp * len(setting.teams))
    jobs = [(measure, setting, order, systems, rounds, turn) for systems in setting.teams]
    return combine(order, [rank for team in pool.run_teams(setting.pp, jobs) for rank in team])


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


def profile(say: Say, setting: Setting) -> ProfiledModel:
    """Return what each layer costs in this process alone; nothing is read that was measured before."""
    from pipekit.costs.profiling import profile_layers
    from pipekit.layers.parameters import parameter_shapes
    from pipekit.layers.specs import layer_names

    workload = setting.build_workload()
    inputs, labels = next(workload.micro_batches())
    with tempfile.TemporaryDirectory() as cache:
        costs = profile_layers(
            workload.specs,
            inputs,
            dtype=workload.dtype,
            device="cpu",
            loss_fn=workload.loss_fn,
            labels=labels,
            cache_dir=cache,
            on_progress=lambda text, _: say(text),
        )
    return ProfiledModel(
        costs=costs,
        shapes=parameter_shapes(workload.specs),
        layer_names=layer_names(workload.specs),
        type_names=[spec.type_name for spec in workload.specs],
        precision=workload.precision,
        zero=workload.zero,
        sequence_length=workload.inputs.shape[1],
        micro_batch_size=workload.micro_batch_size,
    )


def find_deepspeed_boundaries(say: Say, setting: Setting, partitions: Sequence[str]) -> list[tuple[int, ...]]:
    """Return which layer each stage begins with in DeepSpeed's partitions, with the number of layers behind them."""
    from pipelines.peers import build_deepspeed_module

    workload = setting.build_workload()
    found = []
    for partition in partitions:
        say(f"build of DeepSpeed's module, partition {partition}")
        module = build_deepspeed_module(workload, partition=partition)
        found.append(tuple(map(int, module.parts)))
    return found


def _build(setting: Setting, contender: Contender) -> Step:
    # Imported here, in the ranks: the command itself needs neither torch nor DeepSpeed.
    from pipelines.limit import build_limit
    from pipelines.ours import build_ours
    from pipelines.peers import build_deepspeed, build_torch

    workload = setting.build_workload()
    if contender.system == "DeepSpeed":
        return build_deepspeed(workload, partition=contender.partition)
    if contender.system == "torch":
        return build_torch(workload, schedule=contender.schedule, boundaries=contender.boundaries)
    if contender.system == "limit":
        return build_limit(workload, boundaries=contender.boundaries)
    assert contender.table is not None
    return build_ours(
        workload,
        table=contender.table,
        boundaries=contender.boundaries,
        measure_costs=contender.measures_costs,
        max_in_flight=max_in_flight(contender.schedule, pp=setting.pp),
    )
