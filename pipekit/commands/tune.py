"""`pipekit tune`: search for the fastest configuration, or a learning rate, with short runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipekit.commands.shared_options import AsJson, TrustCode
from pipekit.errors import ConfigError, PipekitError

_LR_STEPS, _TIMED_STEPS = 100, 8


@dataclass(frozen=True)
class TuneOptions:
    """Options of `pipekit tune config.yaml`, described in its help."""

    out: Path
    most_runs: int
    num_devices: int | None
    max_tp: int
    fixed: Sequence[str]
    num_steps: int
    limit_s: float
    dry_run: bool
    as_json: bool


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[lr] CONFIG [KEY=VALUE]...",
            help="YAML file of the run, and keys to change, such as train.global_batch_size=64. With `lr` before it, "
            "only the learning rate is tuned.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the best configuration.")] = Path("tuned.yaml"),
    runs: Annotated[int, typer.Option(min=1, help="Maximum number of candidates to run.")] = 10,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes; by default one per GPU, or else per core.", show_default=False),
    ] = None,
    max_tp: Annotated[int, typer.Option(min=1, help="Largest tensor-parallel degree to try.")] = 1,
    fix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE]",
            help="Key not to tune, such as parallel.zero=1; without a value, keep the configuration's. Repeatable.",
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1.0, help="Time limit of each run in seconds.")] = 300.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the candidates.")] = False,
    as_json: AsJson = False,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Timed steps of each run, {_TIMED_STEPS} by default; with `lr`, steps of the test, {_LR_STEPS} by "
            "default.",
            show_default=False,
        ),
    ] = None,
    lowest: Annotated[float, typer.Option("--from", help="With `lr`: learning rate of the first step.")] = 1e-7,
    highest: Annotated[float, typer.Option("--to", help="With `lr`: learning rate of the last step.")] = 1.0,
    trust_code: TrustCode = False,
) -> None:
    """Find the fastest settings, or a learning rate, with short runs.

    It tunes the layout, schedule, micro-batch size, ZeRO stage and activation checkpointing. The plan lists candidates
    and predicts their speed; the most promising run for a few steps each, and their times correct the predictions for
    the others. The global batch, model and data stay the same.
    """
    from pipekit.config.stored_code import check_stored_code

    tunes_rate = words[0] == "lr"
    path, *overrides = words[1:] if tunes_rate and len(words) > 1 else words
    if (tunes_rate and len(words) == 1) or "=" in path:
        raise ConfigError(
            f"tune {' '.join(words)}: give the file: pipekit tune config.yaml, or pipekit tune lr config.yaml"
        )
    check_stored_code(Path(path), overrides, trust_code=trust_code)
    if tunes_rate:
        _tune_rate(Path(path), overrides, lowest=lowest, highest=highest, steps=steps or _LR_STEPS)
        return
    options = TuneOptions(
        out, runs, devices, max_tp, fix or (), steps or _TIMED_STEPS, time_limit, dry_run=dry_run, as_json=as_json
    )
    _tune_layout(Path(path), overrides, options)


def _tune_layout(path: Path, overrides: Sequence[str], options: TuneOptions) -> None:
    """Measure candidates, show the results, and write the best configuration."""
    from pipekit.commands.tune_report import show_report, tune_report, tuned_yaml
    from pipekit.commands.tune_session import open_session
    from pipekit.config import load_config
    from pipekit.signals import Interrupted
    from pipekit.storage import check_writable, storing
    from pipekit.training.console import make_console
    from pipekit.tune.candidates import list_candidates
    from pipekit.tune.search import Measured, Search

    config = load_config(path, overrides)
    if not options.dry_run:
        check_writable(options.out.absolute().parent, name="--out ")
    interruption: BaseException | None = None
    with open_session(
        config,
        num_devices=options.num_devices,
        max_tp=options.max_tp,
        fixed=options.fixed,
        num_steps=options.num_steps,
        limit_s=options.limit_s,
    ) as session:
        search = Search(list_candidates(session.choices))

        def measure(index: int) -> Measured:
            sys.stderr.write(f"run {len(search.results) + 1}: {session.choices[index].prediction.plan} ...\n")
            return session.measure(index)

        if not options.dry_run:
            try:
                search.run(measure, most_runs=options.most_runs)
            except (Interrupted, KeyboardInterrupt) as error:
                interruption = error
    best = search.best
    if options.dry_run:
        verdict = "nothing was run, because of --dry-run"
    elif best is None:
        verdict = (
            "no candidate finished its run; the last column says why" if search.results else "no candidate was run"
        )
    else:
        measured_s = search.results[best].step_time_s
        assert measured_s is not None
        text = tuned_yaml(
            session.choices[best],
            measured_s=measured_s,
            num_runs=len(search.results),
            num_candidates=len(session.choices),
            num_devices=session.num_devices,
        )
        with storing(f"--out {options.out}"):
            options.out.write_text(text, encoding="utf-8")
        left = (
            "interrupted"
            if interruption is not None
            else f"no other is expected to be more than {search.margin:.0%} faster"
            if search.choose() is None
            else f"stopped after --runs {options.most_runs}"
        )
        verdict = f"best: {session.choices[best].prediction.plan}; {left}; written to {options.out}"
    report = tune_report(session, search, verdict=verdict)
    if options.as_json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        show_report(report, make_console())
    if interruption is not None:
        raise interruption
    if best is None and not options.dry_run:
        raise typer.Exit(1)


def _tune_rate(path: Path, overrides: Sequence[str], *, lowest: float, highest: float, steps: int) -> None:
    """Train a few steps, multiplying the learning rate by the same factor at each, and suggest a learning rate.

    The run has the layout, batch and data of the configuration, and its own folder, `lr-range` in run.dir.
    """
    import shutil
    from importlib.util import find_spec

    from pipekit.commands.train import start
    from pipekit.config import load_config
    from pipekit.plan.run_folder import RunFolder
    from pipekit.tune.lr_range import RULE, draw_range_test, range_test_config, read_range_test, table_rows

    config = range_test_config(load_config(path, overrides), lowest=lowest, highest=highest, steps=steps)
    folder = RunFolder(config.run.dir)
    if folder.path.is_dir():
        shutil.rmtree(folder.path)
    try:
        start(config)
    except PipekitError as error:
        # High rates may well end a run; the steps before that are enough.
        if not folder.metrics.is_file():
            raise
        typer.echo(f"the run ended early: {error}")
    if folder.checkpoints.is_dir():
        shutil.rmtree(folder.checkpoints)
    result = read_range_test(folder.metrics)
    rows = [("learning rate", "loss", "smoothed", ""), *table_rows(result)]
    for row in rows:
        typer.echo(f"{row[0]:>13}  {row[1]:>8}  {row[2]:>8}  {row[3]}".rstrip())
    if find_spec("matplotlib") is None:
        typer.echo("no picture, because matplotlib is not installed; type: pip install 'pipekit[plot]'")
    else:
        picture = folder.path / "lr-range.png"
        draw_range_test(picture, result)
        typer.echo(f"picture: {picture}")
    typer.echo(f"suggestion: optimizer.lr={result.suggestion:g}, which is {RULE}")
