"""`pipekit tune`: settings found by short runs."""

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
    """Options of `pipekit tune config.yaml`, as its help describes them."""

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
            help="The YAML file of the run, and changes such as train.global_batch_size=64. With `lr` before it, the "
            "learning rate is tuned, and nothing else.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the configuration that is found.")] = Path(
        "tuned.yaml"
    ),
    runs: Annotated[int, typer.Option(min=1, help="Most candidates to run.")] = 10,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; the GPUs present, or one for each core, if left out.", show_default=False),
    ] = None,
    max_tp: Annotated[int, typer.Option(min=1, help="Largest tensor-parallel degree to try.")] = 1,
    fix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE]",
            help="Key that is not tuned, such as parallel.zero=1; without a value it stays as it is. May be repeated.",
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1.0, help="Seconds after which a run is ended.")] = 300.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the candidates, and run none.")] = False,
    as_json: AsJson = False,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Steps of each run that are timed, {_TIMED_STEPS} if left out; with `lr` steps of the test, "
            f"{_LR_STEPS} if left out.",
            show_default=False,
        ),
    ] = None,
    lowest: Annotated[float, typer.Option("--from", help="With `lr`: learning rate of the first step.")] = 1e-7,
    highest: Annotated[float, typer.Option("--to", help="With `lr`: learning rate of the last step.")] = 1.0,
    trust_code: TrustCode = False,
) -> None:
    """Find the fastest layout, schedule, micro-batch size and ZeRO stage of a run by short runs; or a learning rate.

    The plan says which candidates there are and how fast they should be; the most promising are run for a few steps
    each, and what they take corrects the plan for the others. The global batch, the model and the data stay the same.
    """
    from pipekit.config.stored_code import check_stored_code

    tunes_rate = words[0] == "lr"
    path, *overrides = words[1:] if tunes_rate and len(words) > 1 else words
    if (tunes_rate and len(words) == 1) or "=" in path:
        raise ConfigError(
            f"tune {' '.join(words)}: name the file: pipekit tune config.yaml, or pipekit tune lr config.yaml"
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
    """Measure candidates, show what was found, and write the best configuration."""
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
            "no candidate that was run has trained; the last column says why" if search.results else "none was run"
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
            "it was interrupted"
            if interruption is not None
            else f"none of the others is expected to be faster by {search.margin:.0%}"
            if search.choose() is None
            else f"it ended after --runs {options.most_runs}"
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
    """Train a few steps, at each of which the rate rises by the same factor, and suggest a learning rate.

    The run has the layout, the batch and the data of the configuration, and a folder of its own, `lr-range` in run.dir.
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
        # High rates may well end a run; the steps before are what counts.
        if not folder.metrics.is_file():
            raise
        typer.echo(f"the run has ended early: {error}")
    if folder.checkpoints.is_dir():
        shutil.rmtree(folder.checkpoints)
    result = read_range_test(folder.metrics)
    rows = [("learning rate", "loss", "smoothed", ""), *table_rows(result)]
    for row in rows:
        typer.echo(f"{row[0]:>13}  {row[1]:>8}  {row[2]:>8}  {row[3]}".rstrip())
    if find_spec("matplotlib") is None:
        typer.echo("no picture, since matplotlib is not installed: pip install 'pipekit[plot]'")
    else:
        picture = folder.path / "lr-range.png"
        draw_range_test(picture, result)
        typer.echo(f"picture: {picture}")
    typer.echo(f"suggestion: optimizer.lr={result.suggestion:g}, which is {RULE}")
