"""`pipekit doctor`: checks of this machine, or of several, with a verdict and a remedy for each problem."""

from __future__ import annotations

import json
import os
import re
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipekit.commands.shared_options import (
    AsJson,
    Exclude,
    Hostfile,
    HostPython,
    Include,
    MasterAddress,
    SshArguments,
    SshPort,
)
from pipekit.errors import LaunchError, printable

if TYPE_CHECKING:
    from pipekit.doctor.rows import Row
    from pipekit.launch.hosts import Host
    from pipekit.launch.ssh import SshSettings

_WIDTH = 80
_NAME_WIDTH = 20


def command(
    run_dir: Annotated[Path, typer.Option("--dir", help="Folder of the runs, whose disk is checked.")] = Path("runs"),
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of prepared tokens (data.cache_dir); ~/.cache/pipekit by default.", show_default=False
        ),
    ] = None,
    ranks: Annotated[bool, typer.Option(help="Start ranks and measure the speed of messages between them.")] = True,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    master_addr: MasterAddress = None,
    ssh_port: SshPort = None,
    ssh_args: SshArguments = "",
    python: HostPython = None,
    as_json: AsJson = False,
) -> None:
    """Check that this machine, or hosts in a hostfile, can train.

    Each finding has a verdict, and a remedy if there is a problem. The exit code is 1 if a verdict is bad, else 0.
    """
    if hostfile is None:
        for option, value in {"--include": include, "--exclude": exclude, "--master_addr": master_addr}.items():
            if value:
                raise LaunchError(f"{option} applies to the hosts of --hostfile; give that as well")
        rows = _examine_here(run_dir, cache_dir, ranks=ranks, as_json=as_json)
    else:
        from pipekit.launch.hosts import check_address, read_hostfile, select_hosts
        from pipekit.launch.ssh import SshSettings

        if master_addr is not None:
            check_address(master_addr, "--master_addr")
        hosts = select_hosts(read_hostfile(hostfile), include=include, exclude=exclude)
        ssh = SshSettings.from_options(python, ssh_port, ssh_args)
        arguments = ["--dir", str(run_dir), *([] if cache_dir is None else ["--cache-dir", str(cache_dir)])]
        arguments += [] if ranks else ["--no-ranks"]
        rows = _examine_hosts(hosts, ssh, arguments, run_dir, master_addr, ranks=ranks, as_json=as_json)
    if any(row.verdict == "bad" for row in rows):
        raise typer.Exit(1)


def row_lines(row: Row) -> list[str]:
    """Lines of a row, at most 80 columns wide."""
    first = f"  {row.verdict:<8} {printable(row.check):<{_NAME_WIDTH}} "
    indent = " " * len(f"  {'':<8} {'':<{_NAME_WIDTH}} ")
    if len(first) > len(indent):  # a long name gets its own line
        lines = [first.rstrip(), *_wrap(row.found, indent, indent)]
    else:
        lines = _wrap(row.found, first, indent)
    return lines + (_wrap(f"-> {row.advice}", indent, f"{indent}   ") if row.advice else [])


def _wrap(text: str, first: str, indent: str) -> list[str]:
    # A number and its unit stay together.
    joined = re.sub(r"(?<=[0-9]) (?=\w)", "\u00a0", printable(text))
    lines = textwrap.wrap(joined, _WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in lines] or [first.rstrip()]


def summary_line(rows: Sequence[Row]) -> str:
    """Number of rows with each verdict."""
    counts = Counter(row.verdict for row in rows)
    warnings = f"{counts['warning']} {'warning' if counts['warning'] == 1 else 'warnings'}"
    return f"{counts['ok']} ok, {warnings}, {counts['bad']} bad"


def _examine_here(run_dir: Path, cache_dir: Path | None, *, ranks: bool, as_json: bool) -> list[Row]:
    from pipekit.data.prepare import DEFAULT_CACHE_DIR
    from pipekit.doctor.examine import examine
    from pipekit.doctor.rows import Site
    from pipekit.launch.resources import num_accelerators

    site = Site(
        environ=dict(os.environ),
        run_dir=run_dir,
        cache_dir=cache_dir or Path(DEFAULT_CACHE_DIR),
        num_gpus=num_accelerators(os.environ),
        uses_ranks=ranks,
    )
    rows: list[Row] = []
    for row in examine(site):
        if not as_json:
            if not rows or rows[-1].family != row.family:
                typer.echo(row.family)
            _show([row])
        rows.append(row)
    if as_json:
        _print_json([row.to_record() for row in rows])
    else:
        typer.echo(summary_line(rows))
    return rows


def _examine_hosts(
    hosts: Sequence[Host],
    ssh: SshSettings,
    arguments: Sequence[str],
    run_dir: Path,
    master_addr: str | None,
    *,
    ranks: bool,
    as_json: bool,
) -> list[Row]:
    from pipekit.doctor.hosts import ALL_HOSTS, examine_hosts, examine_together
    from pipekit.launch.exports import exported_environ

    environ = exported_environ(os.environ, [], home=Path.home(), folder=Path.cwd())
    by_host = examine_hosts(hosts, ssh, arguments)
    for host, rows in by_host.items():
        if not as_json:
            typer.echo(f"{host}: {summary_line(rows)}")
            _show(row for row in rows if row.verdict != "ok")
    is_reached = all(row.check != "ssh" for rows in by_host.values() for row in rows)
    if ranks and is_reached:
        by_host[ALL_HOSTS] = examine_together(hosts, ssh, environ, run_dir / "doctor" / "logs", master_addr)
        if not as_json:
            typer.echo(f"{ALL_HOSTS}: {summary_line(by_host[ALL_HOSTS])}")
            _show(by_host[ALL_HOSTS])
    elif ranks and not as_json:
        typer.echo(f"{ALL_HOSTS}: messages were not measured because a host was not reached")
    if as_json:
        _print_json([{"host": host, **row.to_record()} for host, rows in by_host.items() for row in rows])
    return [row for rows in by_host.values() for row in rows]


def _show(rows: Iterable[Row]) -> None:
    for row in rows:
        for line in row_lines(row):
            typer.echo(line)


def _print_json(records: Sequence[dict[str, object]]) -> None:
    typer.echo(json.dumps({"time_s": time.time(), "rows": records}))
