"""`pipekit schedule`: a pipeline schedule, proved, simulated and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    name: Annotated[
        str, typer.Argument(help="gpipe, 1f1b, interleaved-1f1b, zb-h1, zb-v, auto, or a CSV file.", show_default=False)
    ],
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 8,
    stages_per_rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stages on each rank; what the schedule is made for unless given.", show_default=False
        ),
    ] = None,
    costs: Annotated[
        str, typer.Option(help="Milliseconds of a rank's forward, input gradient and weight gradient.")
    ] = "10,10,10",
    transfer: Annotated[float, typer.Option(min=0.0, help="Milliseconds of a message between ranks.")] = 0.0,
    max_in_flight: Annotated[
        int | None,
        typer.Option(min=1, help="For auto: stage activations that a rank may hold.", show_default=False),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write the table to this file.", show_default=False),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the timeline into this .svg or .png file.", show_default=False),
    ] = None,
) -> None:
    """Show who does what when: plan a pipeline schedule, prove that it runs, and simulate a step."""
    from pipekit.commands.schedule_preview import preview

    typer.echo(
        preview(
            name,
            pp=pp,
            num_micro_batches=micro_batches,
            stages_per_rank=stages_per_rank,
            costs_ms=costs,
            transfer_ms=transfer,
            max_in_flight=max_in_flight,
            csv=csv,
            picture=picture,
        )
    )
