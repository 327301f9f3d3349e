"""`pipekit checkpoints`: the checkpoints of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipekit.commands.shared_options import AsJson
from pipekit.number_text import bytes_text

if TYPE_CHECKING:
    from pipekit.checkpoint.combine import TensorDifference
    from pipekit.checkpoint.overview import CheckpointSummary


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[average|ema|prune|gather] RUN",
            help="Folder of a run. Lists its checkpoints, unless `average`, `ema`, `prune` or `gather` comes before "
            "it. `gather` also takes one checkpoint.",
            show_default=False,
        ),
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Read every checkpoint and check all checksums.")] = False,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Compare the tensors of two checkpoints, given by step, name or path.", show_default=False),
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="With average: number of newest checkpoints to average.")] = 5,
    keep: Annotated[
        int | None, typer.Option(min=1, help="With prune: number of newest checkpoints to keep.", show_default=False)
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option(min=1, help="With prune: also keep every step that is a multiple of this.", show_default=False),
    ] = None,
    keep_best: Annotated[
        str | None, typer.Option(help="With prune: also keep the checkpoint with the best value of this metric.")
    ] = None,
    best_is: Annotated[
        Literal["lowest", "highest"],
        typer.Option(help="With --keep-best: whether the lowest or highest value is best."),
    ] = "lowest",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With prune: only list the surplus checkpoints.")] = False,
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", "-H", help="With gather: file that lists the hosts with the missing files."),
    ] = None,
    ssh_port: Annotated[
        int | None, typer.Option("--ssh_port", "--ssh-port", min=1, max=65535, help="With gather: port of ssh.")
    ] = None,
    ssh_args: Annotated[
        str, typer.Option("--ssh_args", "--ssh-args", help="With gather: more arguments for ssh, in one string.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List, verify, compare, average or prune a run's checkpoints.

    `ema` makes a model of the newest checkpoint's moving average. If each host has only a part of the checkpoints,
    `gather` copies the missing files of the newest one to this machine.
    """
    from pipekit.checkpoint.combine import average_checkpoints, compare_checkpoints
    from pipekit.checkpoint.manifest import EMA, list_checkpoints
    from pipekit.checkpoint.overview import checkpoints_folder, find_checkpoint, summarize_checkpoints
    from pipekit.checkpoint.retention import Retention, list_surplus, remove_checkpoint
    from pipekit.errors import CheckpointError

    *action, run = words
    if action not in ([], ["average"], ["ema"], ["prune"], ["gather"]):
        raise CheckpointError(
            f"{' '.join(words)}: give the folder of a run, or average, ema, prune or gather and the folder"
        )
    if action == ["gather"]:
        _gather(Path(run), hostfile, ssh_port, ssh_args)
        return
    folder = checkpoints_folder(Path(run))
    if action == ["average"]:
        chosen = list_checkpoints(folder)[-last:]
        typer.echo(f"averaged {', '.join(path.name for path in chosen)}: {average_checkpoints(chosen, folder)}")
    elif action == ["ema"]:
        newest = list_checkpoints(folder)[-1]
        typer.echo(f"moving average of {newest.name}: {average_checkpoints([newest], folder, kind=EMA)}")
    elif action == ["prune"]:
        if keep is None:
            raise CheckpointError("prune removes checkpoints; give the number of newest ones to keep, such as --keep 2")
        for path in list_surplus(folder, Retention(keep, keep_every, keep_best, best_is)):
            typer.echo(f"{'would remove' if dry_run else 'removed'} {path}")
            if not dry_run:
                remove_checkpoint(path)
    elif diff is not None:
        one, other = (find_checkpoint(folder, name) for name in diff)
        _show_differences(compare_checkpoints(one, other), as_json=as_json)
    else:
        summaries = summarize_checkpoints(folder, verify=verify)
        _show_summaries(summaries, verified=verify, as_json=as_json)
        if verify and any(summary.faults for summary in summaries):
            raise typer.Exit(1)


def _gather(run: Path, hostfile: Path | None, ssh_port: int | None, ssh_args: str) -> None:
    from pipekit.errors import CheckpointError
    from pipekit.launch.gather import gather_over_ssh
    from pipekit.launch.hosts import read_hostfile, select_hosts
    from pipekit.launch.ssh import SshSettings, split_arguments

    if hostfile is None:
        raise CheckpointError("gather copies files from other hosts; name them with --hostfile FILE")
    ssh = SshSettings(Path("/"), "python3", ssh_port, split_arguments(ssh_args, "--ssh_args"))
    gathered = gather_over_ssh(run, select_hosts(read_hostfile(hostfile)), ssh)
    for file, host in gathered.sources.items():
        typer.echo(f"{file} from {host}")
    typer.echo(f"{gathered.checkpoint} is whole on this machine")


def _show_summaries(summaries: Sequence[CheckpointSummary], *, verified: bool, as_json: bool) -> None:
    records = [_record(summary) for summary in summaries]
    if as_json:
        _print_json(records)
        return
    rows = [("name", "step", "loss", "val loss", "size", "written by", "state")]
    for record in records:
        loss, val_loss = ("-" if record[key] is None else f"{record[key]:.4f}" for key in ("loss", "val_loss"))
        state = record["state"] if record["faults"] else "verified" if verified else "whole"
        rows.append(
            (
                record["name"],
                "-" if record["step"] is None else str(record["step"]),
                loss,
                val_loss,
                bytes_text(record["bytes"]),
                record["layout"] or "-",
                f"{state}, latest" if record["is_latest"] else state,
            )
        )
    _print_table(rows)
    for record in records:
        for fault in record["faults"]:
            typer.echo(f"{record['state']}: {fault}")


def _record(summary: CheckpointSummary) -> dict[str, Any]:
    training = None if summary.manifest is None else summary.manifest.training
    metrics = {} if training is None else training.metrics
    return {
        "name": summary.path.name,
        "path": str(summary.path),
        "step": None if training is None else training.step,
        "loss": metrics.get("loss"),
        "val_loss": metrics.get("val_loss"),
        "bytes": summary.num_bytes,
        "layout": None if summary.manifest is None else summary.manifest.written_by.get("layout"),
        "is_latest": summary.is_latest,
        "state": "in part" if summary.is_partial else "damaged" if summary.faults else "whole",
        "faults": list(summary.faults),
    }


def _show_differences(differences: Sequence[TensorDifference], *, as_json: bool) -> None:
    if as_json:
        _print_json(
            [
                {**vars(each), "largest": _finite(each.largest), "relative": _finite(each.relative)}
                for each in differences
            ]
        )
        return
    if not differences:
        typer.echo("the tensors are the same, bit for bit")
        return
    rows = [("tensor", "kind", "largest difference", "relative")]
    for each in differences:
        if each.largest is None or each.relative is None:
            rows.append((each.name, each.kind, each.reason, "-"))
        else:
            rows.append((each.name, each.kind, f"{each.largest:.3g}", f"{each.relative:.3g}"))
    _print_table(rows)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _finite(number: float | None) -> float | None:
    """The number, or None if JSON cannot express it."""
    return number if number is not None and math.isfinite(number) else None


def _print_json(records: list[dict[str, Any]]) -> None:
    typer.echo(json.dumps(records, indent=1))
