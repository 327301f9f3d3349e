"""`pipekit plan`: stages, memory and time of a run, without starting it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipekit.commands.shared_options import AsJson, ConfigFile, Overrides, TrustCode
from pipekit.errors import ConfigError
from pipekit.launch.resources import find_resources
from pipekit.plan.resources import Resources
from pipekit.progress import ProgressLines
from pipekit.storage import storing

if TYPE_CHECKING:
    from pipekit.config import Config
    from pipekit.predictions.devices import Device
    from pipekit.predictions.prediction import Prediction

_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class PlanOptions:
    """Options of `pipekit plan`, described in its help; without `num_devices`, the configuration sets the layout."""

    num_devices: int | None = None
    device: str | None = None
    device_files: Sequence[Path] = ()
    max_tp: int | None = None
    measure: bool = False
    num_tokens: int | None = None
    price: float | None = None


def command(
    config: ConfigFile,
    overrides: Overrides = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Compare all layouts over this many devices.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Device of each rank, such as h100; by default that of this machine.", show_default=False),
    ] = None,
    device_file: Annotated[
        list[Path] | None,
        typer.Option(help="YAML file that describes your own devices; repeatable.", show_default=False),
    ] = None,
    max_tp: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest tensor-parallel degree to compare. By default, keep a parallel.tp above 1, or else compare "
            "all degrees within a node of GPUs.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of a whole run, such as 300B, to show how many days it takes.", show_default=False),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0.0, help="With --tokens: price of a device per hour.", show_default=False),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time the layers on this machine.")] = False,
    as_json: AsJson = False,
    trust_code: TrustCode = False,
    html: Annotated[
        Path | None,
        typer.Option(help="HTML page to write; it opens offline.", show_default=False),
    ] = None,
) -> None:
    """Show the stages, memory and time of a run before it starts.

    With --devices or `parallel: auto`, compare layouts and recommend the fastest.
    """
    from pipekit.config.sources import read_config

    num_tokens = None if tokens is None else parse_tokens(tokens)
    options = PlanOptions(devices, device, tuple(device_file or ()), max_tp, measure, num_tokens, price)
    loaded = read_config(config, overrides or [], trust_code=trust_code)
    report = plan_report(loaded, options)
    if html is not None:
        from pipekit.pages.plan_page import render_html

        with storing(f"--html {html}"):
            html.write_text(render_html(report), encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return
    from pipekit.commands.plan_tables import show_report
    from pipekit.training.console import make_console, show_export_limit

    console = make_console()
    show_report(report, console)
    show_export_limit(loaded, console)
    if html is not None:
        sys.stdout.write(f"wrote {html}\n")


def plan_report(config: Config, options: PlanOptions) -> dict[str, Any]:
    """Prediction of a run as plain data.

    Raises:
        PipekitError: if nothing fits.
    """
    from pipekit.partitioners import compare_partitions
    from pipekit.plan.decide import build_specs, decide_run
    from pipekit.plan.search import search, tp_degrees
    from pipekit.predictions.prediction import predict
    from pipekit.predictions.report import report
    from pipekit.training.prepare import load_trial

    compares = options.num_devices is not None or config.parallel.auto
    _check_options(options, compares=compares)
    resources = find_resources(os.environ, config, asks_gpu=options.device is None)
    number = options.num_devices or resources.num_devices
    if not compares:
        number = _num_devices(config, resources.num_gpus if options.device is None else None)
    device = _device(options, resources, number)
    is_gpu = device.name != "cpu"
    # The planned devices may not be on this machine.
    config = config.updated({"run.device": "cuda" if is_gpu else "cpu"})
    resources = replace(
        resources,
        num_gpus=number if is_gpu else None,
        gpu_memory_bytes=device.memory_bytes,
        memory_bytes=device.memory_bytes * number,
    )
    if options.measure:
        config = config.updated({"parallel.partition": "profile"})
    elif options.device is not None and config.parallel.partition == "profile":
        # Layers can only be timed on this machine, which may not have the named device.
        config = config.updated({"parallel.partition": "flops"})
    trial = load_trial(config)
    tell = ProgressLines.on_stderr()
    needs_data = config.model.needs_data or not config.train.has_steps
    prepared = trial.prepare(config, tell) if needs_data else None
    if compares:
        config, specs = build_specs(config, trial, prepared)
        if options.max_tp is None and config.parallel.tp > 1:
            tp = [config.parallel.tp]  # which the user has chosen
        else:
            # `parallel: auto` never chooses tensor parallelism.
            tp = tp_degrees(options.max_tp or (1 if config.parallel.auto or not is_gpu else number), device)
        model, result = search(config, specs, trial, num_devices=number, device=device, is_gpu=is_gpu, tp=tp)
        found = report(result.ranked[0], device, model.layer_names, result)
        return {**found, "steps": config.train.steps, **_whole_run(result.ranked[0], options)}
    decision = decide_run(config, trial, resources, prepared=prepared, on_progress=tell)
    boundaries, stages = decision.plan.boundaries, decision.plan.schedule.num_stages
    prediction = predict(decision.model, decision.parallel_plan, device, boundaries)
    partitions = compare_partitions(decision.partition_inputs, stages) if stages > 1 else ()
    found = report(prediction, device, decision.plan.layer_names, partitions=partitions)
    return {**found, "steps": decision.plan.config.train.steps, **_whole_run(prediction, options)}


def parse_tokens(text: str) -> int:
    """Number of tokens from text such as 300B.

    Raises:
        ConfigError: if it is not a number of tokens.

    Example:
        >>> parse_tokens("300B"), parse_tokens("1.4T"), parse_tokens("5_000")
        (300000000000, 1400000000000, 5000)
    """
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS else (text, "")
    try:
        found = float(number) * _UNITS.get(unit, 1)
    except ValueError:
        found = 0.0
    if not 1 <= found < inf:
        raise ConfigError(
            f"--tokens {text}: must be a number of tokens, which may end in K, M, B or T; try --tokens 300B"
        )
    return round(found)


def _whole_run(prediction: Prediction, options: PlanOptions) -> dict[str, Any]:
    """Days, device hours and cost of a run over --tokens, if given."""
    if options.num_tokens is None:
        return {}
    hours = options.num_tokens / prediction.tokens_per_s / 3600
    device_hours = hours * prediction.plan.layout.world_size
    run = {"tokens": options.num_tokens, "days": hours / 24, "device_hours": device_hours}
    return {"run": run if options.price is None else {**run, "cost": device_hours * options.price}}


def _check_options(options: PlanOptions, *, compares: bool) -> None:
    if options.price is not None and options.num_tokens is None:
        raise ConfigError(f"--price {options.price:g} is for a whole run; add --tokens, such as --tokens 300B")
    if options.measure and options.device is not None:
        raise ConfigError(
            f"--measure times layers on this machine, not on --device {options.device}; give only one of them"
        )
    if options.measure and compares:
        raise ConfigError(
            "--measure times the layers for one layout; compare layouts with --devices only, and then measure the one "
            "that you choose"
        )
    if (options.max_tp or 1) > 1 and not compares:
        raise ConfigError(
            f"--max-tp {options.max_tp} is for comparing layouts; add --devices and the number of devices"
        )


def _num_devices(config: Config, present: int | None) -> int:
    """Number of devices of the configuration's layout; `dp: auto` fills those present."""
    parallel = config.parallel
    one = parallel.pp * parallel.tp
    if parallel.dp == "auto":
        return one * max(1, (present or 0) // one)
    return one * parallel.dp


def _device(options: PlanOptions, resources: Resources, num_processes: int) -> Device:
    from pipekit.plan.device import present_device
    from pipekit.predictions.devices import find_device

    if options.device is None and not options.device_files:
        return present_device(resources, num_processes)
    name = resources.gpu_name or "cpu" if options.device is None else options.device
    return find_device(name, options.device_files)
