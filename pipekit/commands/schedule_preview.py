"""A schedule as one looks at it before a run: its table proved, its step simulated and drawn."""

from __future__ import annotations

from pathlib import Path

from pipekit.errors import ConfigError
from pipekit.schedules.catalog import default_stages_per_rank, plan_schedule
from pipekit.schedules.csv_file import write_csv
from pipekit.schedules.draw import draw_picture, draw_text
from pipekit.schedules.simulate import Costs, simulate
from pipekit.schedules.validate import validate


def preview(
    name: str,
    *,
    pp: int,
    num_micro_batches: int,
    stages_per_rank: int | None = None,
    costs_ms: str = "10,10,10",
    transfer_ms: float = 0.0,
    max_in_flight: int | None = None,
    csv: Path | None = None,
    picture: Path | None = None,
) -> str:
    """Return the drawing of a simulated step, and what each rank holds at most.

    Args:
        name: of the schedule, or a CSV file.
        pp: pipeline ranks.
        num_micro_batches: micro-batches of a step.
        stages_per_rank: stages on each rank; what the schedule is made for, unless given.
        costs_ms: milliseconds that a rank spends on a micro-batch's forward, input gradient and weight gradient, over
            all its stages.
        transfer_ms: milliseconds of a message from rank to rank.
        max_in_flight: for `auto`, the stage activations that a rank may hold.
        csv: where to write the table.
        picture: where to draw the timeline.

    Raises:
        ConfigError: if the schedule cannot run so, or `costs_ms` is not three numbers.
    """
    per_rank = stages_per_rank or default_stages_per_rank(name)
    try:
        forward_s, inputs_s, weights_s = (float(cost) / 1000 / per_rank for cost in costs_ms.split(","))
    except ValueError:
        raise ConfigError(
            f"--costs {costs_ms} must be three numbers, the milliseconds of a forward, an input gradient and a weight "
            "gradient; for example 10,12,8"
        ) from None
    costs = Costs.uniform(
        pp * per_rank,
        forward_s=forward_s,
        input_gradient_s=inputs_s,
        weight_gradient_s=weights_s,
        transfer_s=transfer_ms / 1000,
    )
    schedule = plan_schedule(
        name,
        pp=pp,
        num_micro_batches=num_micro_batches,
        stages_per_rank=stages_per_rank,
        costs=costs,
        max_in_flight=max_in_flight,
    )
    validate(schedule)
    timeline = simulate(schedule, costs)
    if csv is not None:
        write_csv(schedule, csv)
    if picture is not None:
        draw_picture(picture, {schedule.name: timeline})
    peaks = ", ".join(str(schedule.peak_in_flight(rank)) for rank in range(pp))
    unit = "micro-batches" if per_rank == 1 else f"micro-batches of one stage, of {per_rank} on each rank"
    return f"{draw_text(timeline)}\nin flight at most, rank by rank: {peaks} ({unit})"
