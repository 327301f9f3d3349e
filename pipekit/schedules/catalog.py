"""Schedules by the names that a configuration uses."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pipekit.errors import ConfigError
from pipekit.schedules.auto import plan_auto
from pipekit.schedules.csv_file import read_csv
from pipekit.schedules.gpipe import plan_gpipe
from pipekit.schedules.interleaved import plan_interleaved_1f1b
from pipekit.schedules.merge_backwards import merge_backwards
from pipekit.schedules.one_f_one_b import plan_1f1b
from pipekit.schedules.placement import plan_placement
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.simulate import Costs
from pipekit.schedules.zb_v import plan_zb_v
from pipekit.schedules.zero_bubble import plan_zb_h1

ScheduleName = Literal["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "auto"]
SCHEDULE_NAMES: tuple[str, ...] = get_args(ScheduleName)


def is_file(name: str) -> bool:
    """True if `name` is the path of a user's table.

    Example:
        >>> is_file("tables/mine.csv"), is_file("zb-h1")
        (True, False)
    """
    return name.endswith(".csv")


def default_stages_per_rank(name: str) -> int:
    """Default number of stages on each rank under a schedule.

    Raises:
        ConfigError: if there is no such schedule, or the file does not hold one.
    """
    if is_file(name):
        schedule = read_csv(name)
        return schedule.num_stages // len(schedule.ranks)
    _check_name(name)
    return 2 if name in ("interleaved-1f1b", "zb-v") else 1


def schedule_placement(name: str, *, pp: int, stages_per_rank: int | None = None) -> tuple[int, ...]:
    """Return the pipeline rank of each stage under a schedule.

    Raises:
        ConfigError: if there is no such schedule, or it cannot run this number of stages per rank.

    Example:
        >>> schedule_placement("zb-v", pp=2), schedule_placement("interleaved-1f1b", pp=2)
        ((0, 1, 1, 0), (0, 1, 0, 1))
    """
    if is_file(name):
        return _read_table(name, pp).placement
    check_stages_per_rank(name, stages_per_rank)
    kind: Literal["v", "looped"] = "looped" if name == "interleaved-1f1b" else "v"
    return plan_placement(kind, pp=pp, stages_per_rank=stages_per_rank or default_stages_per_rank(name))


def check_stages_per_rank(name: str, stages_per_rank: int | None) -> None:
    """Check that a schedule can run a number of stages per rank.

    Raises:
        ConfigError: if it cannot.
    """
    if stages_per_rank is None or is_file(name):
        return
    _check_name(name)
    asked = f"parallel.stages_per_rank={stages_per_rank}"
    if name == "auto" and stages_per_rank < 1:
        raise ConfigError(f"parallel.schedule=auto needs a stage on each rank or more, not {asked}; try 1 or 2")
    if name in ("gpipe", "1f1b", "zb-h1") and stages_per_rank != 1:
        raise ConfigError(
            f"parallel.schedule={name} runs one stage on each rank, not {asked}; remove parallel.stages_per_rank, or "
            "try parallel.schedule=interleaved-1f1b or auto"
        )
    if name == "zb-v" and stages_per_rank != 2:
        raise ConfigError(f"parallel.schedule=zb-v runs 2 stages on each rank, not {asked}; remove it")
    if name == "interleaved-1f1b" and stages_per_rank < 2:
        raise ConfigError(f"parallel.schedule={name} needs 2 stages a rank or more, not {asked}; try 1f1b with 1")


def plan_schedule(
    name: str,
    *,
    pp: int,
    num_micro_batches: int,
    stages_per_rank: int | None = None,
    costs: Costs | None = None,
    max_in_flight: int | None = None,
) -> Schedule:
    """Return the table of a pipeline schedule by its name.

    Args:
        name: one of `SCHEDULE_NAMES`, or the path of a CSV file.
        pp: number of pipeline ranks.
        num_micro_batches: number of micro-batches per step on one pipeline.
        stages_per_rank: number of stages on each rank; the default depends on the schedule.
        costs: costs of the stages, for `auto`; equal costs by default.
        max_in_flight: largest number of stage activations that a rank may hold, for `auto`.

    Raises:
        ConfigError: if the schedule cannot run with these numbers; the message names numbers that work.

    Example:
        >>> print(plan_schedule("1f1b", pp=2, num_micro_batches=2))
        0F0 0F1 0B0 0B1
        1F0 1B0 1F1 1B1
    """
    if num_micro_batches < 1:
        raise ConfigError(
            f"parallel.schedule={name}: a step needs at least one micro-batch, and has {num_micro_batches} "
            "(train.global_batch_size = train.micro_batch_size x micro-batches x dp)"
        )
    if is_file(name):
        return _read_table(name, pp, num_micro_batches)
    check_stages_per_rank(name, stages_per_rank)
    stages_per_rank = stages_per_rank or default_stages_per_rank(name)
    one_stage = {"gpipe": plan_gpipe, "1f1b": plan_1f1b, "zb-h1": plan_zb_h1}
    if name in one_stage:
        return one_stage[name](num_stages=pp, num_micro_batches=num_micro_batches)
    if name == "zb-v":
        return plan_zb_v(pp=pp, num_micro_batches=num_micro_batches)
    if name == "interleaved-1f1b":
        check_micro_batches(name, pp=pp, num_micro_batches=num_micro_batches)
        return plan_interleaved_1f1b(pp=pp, stages_per_rank=stages_per_rank, num_micro_batches=num_micro_batches)
    placement = schedule_placement(name, pp=pp, stages_per_rank=stages_per_rank)
    schedule = plan_auto(
        costs or Costs.uniform(len(placement)),
        placement=placement,
        num_micro_batches=num_micro_batches,
        max_in_flight=max_in_flight,
    )
    # Until costs are measured backwards stay split, so that both halves can be timed.
    return schedule if costs is None else merge_backwards(schedule, costs)


def _check_name(name: str) -> None:
    if name not in SCHEDULE_NAMES:
        raise ConfigError(f"parallel.schedule={name} is none of {', '.join(SCHEDULE_NAMES)}, nor a .csv file")


def check_micro_batches(name: str, *, pp: int, num_micro_batches: int) -> None:
    """Check that a schedule can run a step with a number of micro-batches.

    Raises:
        ConfigError: if it cannot.
    """
    if name == "interleaved-1f1b" and num_micro_batches % pp != 0:
        below = num_micro_batches // pp * pp
        tries = " or ".join(str(number) for number in (below, below + pp) if number)
        raise ConfigError(
            f"parallel.schedule={name} needs a multiple of parallel.pp={pp} micro-batches, and a step has "
            f"{num_micro_batches}; try {tries} (train.global_batch_size = train.micro_batch_size x micro-batches x dp)"
        )


def _read_table(name: str, pp: int, num_micro_batches: int | None = None) -> Schedule:
    if not Path(name).is_file():
        raise ConfigError(f"parallel.schedule={name}: there is no such file")
    schedule = read_csv(name)
    if len(schedule.ranks) != pp:
        raise ConfigError(
            f"parallel.schedule={name} has {len(schedule.ranks)} rows, one for each pipeline rank, and "
            f"parallel.pp={pp}; try parallel.pp={len(schedule.ranks)}"
        )
    if num_micro_batches is not None and schedule.num_micro_batches != num_micro_batches:
        raise ConfigError(
            f"parallel.schedule={name} is for {schedule.num_micro_batches} micro-batches, and a step has "
            f"{num_micro_batches} (train.global_batch_size = train.micro_batch_size x micro-batches x dp)"
        )
    return schedule
