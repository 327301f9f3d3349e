"""`pipekit schedule`: pipeline schedules, validated, simulated and drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer


def command(
    names: Annotated[
        list[str],
        typer.Argument(
            help="gpipe, 1f1b, interleaved-1f1b, zb-h1, zb-v, auto, or a CSV file; several share a picture.",
            show_default=False,
        ),
    ],
    pp: Annotated[int, typer.Option(min=1, max=1024, help="Number of pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, max=65536, help="Micro-batches per step.")] = 8,
    stages_per_rank: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="Stages per rank; by default the number that the schedule needs.", show_default=False
        ),
    ] = None,
    costs: Annotated[
        str, typer.Option(help="Milliseconds that a rank's forward, input gradient and weight gradient take.")
    ] = "10,10,10",
    transfer: Annotated[float, typer.Option(min=0.0, help="Milliseconds that a message between ranks takes.")] = 0.0,
    max_in_flight: Annotated[
        int | None,
        typer.Option(min=1, help="With auto: maximum number of stage activations on a rank.", show_default=False),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write the schedule to this CSV file.", show_default=False),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the timelines in this .svg or .png file.", show_default=False),
    ] = None,
) -> None:
    """Plan, validate, simulate and draw pipeline schedules."""
    from pipekit.errors import ConfigError
    from pipekit.schedules import draw
    from pipekit.schedules.catalog import default_stages_per_rank, plan_schedule
    from pipekit.schedules.csv_file import write_csv
    from pipekit.schedules.simulate import Costs, Timeline, simulate
    from pipekit.schedules.validate import validate

    if csv is not None and len(names) > 1:
        raise ConfigError(f"--csv {csv} holds one schedule, but {len(names)} are given; name only one")
    try:
        forward_s, inputs_s, weights_s = (float(cost) / 1000 for cost in costs.split(","))
        if not all(0 <= cost < math.inf for cost in (forward_s, inputs_s, weights_s)):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--costs {costs} must be three numbers, the milliseconds of a forward, an input gradient and a weight "
            "gradient; for example 10,12,8"
        ) from None
    timelines: dict[str, Timeline] = {}
    for name in dict.fromkeys(names):
        per_rank = stages_per_rank or default_stages_per_rank(name)
        stage_costs = Costs.uniform(
            pp * per_rank,
            forward_s=forward_s / per_rank,
            input_gradient_s=inputs_s / per_rank,
            weight_gradient_s=weights_s / per_rank,
            transfer_s=transfer / 1000,
        )
        schedule = plan_schedule(
            name,
            pp=pp,
            num_micro_batches=micro_batches,
            stages_per_rank=stages_per_rank,
            costs=stage_costs,
            max_in_flight=max_in_flight,
        )
        validate(schedule)
        timelines[schedule.name] = timeline = simulate(schedule, stage_costs)
        if csv is not None:
            write_csv(schedule, csv)
        peaks = ", ".join(str(schedule.peak_in_flight(rank)) for rank in range(pp))
        unit = "micro-batches" if per_rank == 1 else f"micro-batches of one stage; each rank has {per_rank}"
        title = f"{schedule.name}\n" if len(names) > 1 else ""
        typer.echo(f"{title}{draw.draw_text(timeline)}\nin flight at most, rank by rank: {peaks} ({unit})")
    if picture is not None:
        draw.draw_picture(picture, timelines)
