"""The command line. Each command imports what it needs when it runs, so that help and mistakes are answered at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

app = typer.Typer(
    name="pipekit",
    help="Build GPT-style models as lists of layer specs, and train them across pipeline, tensor and ZeRO data "
    "parallelism.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Device = Literal["auto", "cpu", "cuda"]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer reads annotations at run time, on Python 3.10 too)
        typer.Argument(help="Changes, such as train.steps=20 parallel.pp=1.", show_default=False),
    ] = None,
) -> None:
    """Train a model: start the run's processes here, or join them under torchrun, deepspeed, srun or mpirun."""
    from pipekit.commands.train import train as run

    run(config, overrides or [])


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Changes, such as parallel.pp=4.", show_default=False),
    ] = None,
    devices: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Compare every layout over so many devices.", show_default=False),
    ] = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What each rank computes on, such as h100; what is present if left out.", show_default=False),
    ] = None,
    device_file: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="YAML file with devices of your own.", show_default=False),
    ] = None,
    max_tp: Annotated[int, typer.Option(min=1, help="Largest tensor-parallel degree to compare.")] = 1,
    measure: Annotated[bool, typer.Option("--measure", help="Time the layers on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write a page that opens offline.", show_default=False),
    ] = None,
) -> None:
    """Show what a run will take before it starts: stages, memory, time, and which layout to choose."""
    from pipekit.commands.plan import PlanOptions
    from pipekit.commands.plan import plan as run

    options = PlanOptions(devices, device, tuple(device_file or ()), max_tp, measure, as_json, html)
    run(config, overrides or [], options)


@app.command()
def verify(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Changes, such as model.num_layers=2.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates under each layout.")] = 3,
    devices: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1, help="Processes that may run at once; the GPUs present, or 4, if left out.", show_default=False
        ),
    ] = None,
    layouts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Layouts to run, such as pp2,dp2xzero0,pp2xtp2; the configuration's own and small ones if left out.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest relative difference.")] = 1e-4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    keep: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Keep what was recorded, and the logs, in this folder.", show_default=False),
    ] = None,
) -> None:
    """Run a few steps of a model under every layout that fits and in one process, and name the first layer that
    differs."""
    from pipekit.commands.verify import VerifyOptions
    from pipekit.commands.verify import verify as run

    options = VerifyOptions(steps, devices, layouts, tolerance, as_json, keep)
    if not run(config, overrides or [], options):
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the exported tensors.")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, and prove that its logits are the same."""
    from pipekit.inference.export import export_checkpoint

    check = export_checkpoint(source, out, dtype=dtype, overwrite=overwrite)
    typer.echo(f"exported step {check.step} of {check.checkpoint} to {out}")
    typer.echo(
        f"checked against {check.reference}: {check.num_logits:,} logits, "
        f"at most {check.max_logit_difference:.2g} apart (limit {check.tolerance:.2g})"
    )


@app.command()
def generate(
    source: Annotated[
        Path, typer.Argument(help="A run's folder, one of its checkpoints, or an export.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def ",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to draw at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among so many of the likeliest; 0 among all.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[_Device, typer.Option(help="What to compute on.")] = "auto",
) -> None:
    """Sample text from a trained model."""
    from pipekit.inference.stream_text import stream_text

    for piece in stream_text(
        source,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        seed=seed,
        device=device,
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def schedule(
    name: Annotated[
        str, typer.Argument(help="gpipe, 1f1b, interleaved-1f1b, zb-h1, zb-v, auto, or a CSV file.", show_default=False)
    ],
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 8,
    stages_per_rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1, help="Stages on each rank; what the schedule is made for unless given.", show_default=False
        ),
    ] = None,
    costs: Annotated[
        str, typer.Option(help="Milliseconds of a rank's forward, input gradient and weight gradient.")
    ] = "10,10,10",
    transfer: Annotated[float, typer.Option(min=0.0, help="Milliseconds of a message between ranks.")] = 0.0,
    max_in_flight: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="For auto: stage activations that a rank may hold.", show_default=False),
    ] = None,
    csv: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the table to this file.", show_default=False),
    ] = None,
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw the timeline into this .svg or .png file.", show_default=False),
    ] = None,
) -> None:
    """Show who does what when: plan a pipeline schedule, prove that it runs, and simulate a step."""
    from pipekit.commands.schedule import preview

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


@app.command()
def schema(
    out: Annotated[Path | None, typer.Argument(help="File to write; stdout if left out.", show_default=False)] = None,
) -> None:
    """Print the JSON schema of a configuration, with which editors complete and check it."""
    from pipekit.config import config_json_schema

    text = json.dumps(config_json_schema(), indent=2) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    # DeepSpeed's launcher adds this to the command; the environment says the same.
    local_rank: Annotated[Optional[int], typer.Option("--local_rank", hidden=True)] = None,  # noqa: UP045
) -> None:
    if show:
        from importlib.metadata import version as installed_version

        typer.echo(installed_version("pipekit"))
        raise typer.Exit


def main() -> None:
    """Run the command; a mistake of the user's is one message and exit code 2."""
    from pipekit.errors import PipekitError

    try:
        app()
    except PipekitError as error:
        sys.stdout.flush()
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has gone.
        sys.stderr.close()
        sys.exit(141)


if __name__ == "__main__":
    main()
