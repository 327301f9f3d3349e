"""`pipekit tune`: settings found by short runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipekit.commands.shared_options import TrustCode


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="lr CONFIG [KEY=VALUE]...",
            help="`lr`, the YAML file of the run, and changes such as train.global_batch_size=64.",
            show_default=False,
        ),
    ],
    lowest: Annotated[float, typer.Option("--from", help="Learning rate of the first step.")] = 1e-7,
    highest: Annotated[float, typer.Option("--to", help="Learning rate of the last step.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", help="Number of steps.")] = 100,
    trust_code: TrustCode = False,
) -> None:
    """Suggest a learning rate: train a few steps, at each of which the rate rises by the same factor.

    The run has the layout, the batch and the data of the configuration, and a folder of its own, `lr-range` in run.dir.
    """
    import shutil
    from importlib.util import find_spec

    from pipekit.commands.train import start
    from pipekit.config import load_config
    from pipekit.config.stored_code import check_stored_code
    from pipekit.errors import ConfigError, PipekitError
    from pipekit.plan.run_folder import RunFolder
    from pipekit.tune.lr_range import RULE, draw_range_test, range_test_config, read_range_test, table_rows

    action, *rest = words
    if action != "lr" or not rest:
        raise ConfigError(f"tune {' '.join(words)}: say what to tune, and the file: pipekit tune lr config.yaml")
    path, overrides = Path(rest[0]), rest[1:]
    check_stored_code(path, overrides, trust_code=trust_code)
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
