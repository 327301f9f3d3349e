"""Examination of several hosts: each by itself over ssh, in parallel, and then messages between all ranks."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipekit.doctor.collective import LIMIT_S, judge_failure, judge_output
from pipekit.doctor.rows import Row
from pipekit.errors import PipekitError
from pipekit.launch.collective_rank import COMMAND
from pipekit.launch.facts import CLOCK_LIMIT_S
from pipekit.launch.fleet import FleetRun, run_fleet
from pipekit.launch.hosts import Host
from pipekit.launch.node import NodeJob
from pipekit.launch.ssh import SshSettings, ssh_command

ALL_HOSTS = "all hosts"
"""Replaces the host name in rows about all hosts together."""

_EXAMINE_S = 180.0
_SILENCE_S = 30.0
_MOST_CONNECTIONS = 32


@dataclass(frozen=True)
class HostReport:
    """Findings of a host about itself, and its clock.

    Attributes:
        rows: its findings.
        ahead_s: how far its clock is ahead of this machine's.
    """

    rows: Sequence[Row]
    ahead_s: float


def examine_hosts(hosts: Sequence[Host], ssh: SshSettings, arguments: Sequence[str]) -> dict[str, Sequence[Row]]:
    """Findings of every host by its name; an unreachable host has that as its only finding.

    Args:
        hosts: the hosts.
        ssh: settings for reaching them.
        arguments: arguments of `pipekit doctor` there.
    """
    with ThreadPoolExecutor(_MOST_CONNECTIONS) as pool:
        found = pool.map(lambda host: _examine(host, ssh, arguments), hosts)
        return {host.name: rows for host, rows in zip(hosts, found, strict=True)}


def examine_together(
    hosts: Sequence[Host], ssh: SshSettings, environ: Mapping[str, str], log_dir: Path, master_addr: str | None
) -> list[Row]:
    """Findings about all hosts together: their versions, and the speed of messages between their ranks.

    Args:
        hosts: reachable hosts; each slot starts a rank.
        ssh: settings for reaching them.
        environ: variables to set on the hosts.
        log_dir: folder of the ranks' logs.
        master_addr: address of the first host; None detects it.
    """
    job = NodeJob(COMMAND, (str(LIMIT_S),), (), "auto", environ=environ, log_dir=str(log_dir), timeout_s=2.0 * LIMIT_S)
    num_ranks = sum(len(host.slots) for host in hosts)
    title = f"{num_ranks} ranks on {len(hosts)} hosts"
    written = io.StringIO()
    try:
        with contextlib.redirect_stdout(written):
            run_fleet(FleetRun(hosts, job, ssh, log_dir, master_addr=master_addr))
    except PipekitError as error:
        return [judge_failure(title, str(error), on_one_machine=False)]
    versions = Row("versions", "ok", "Python, torch, DeepSpeed and pipekit's code are the same on all hosts")
    return [versions, *judge_output(title, written.getvalue(), on_one_machine=len(hosts) == 1)]


def parse_report(output: str, *, received_s: float) -> HostReport | None:
    """Report in the output of `pipekit doctor --json` on a host, after any output of its login shell.

    None if the output has no report.
    """
    start = output.find('{"time_s"')
    if start < 0:
        return None
    try:
        record: dict[str, Any] = json.loads(output[start:])
        rows = [Row.from_record(each) for each in record["rows"]]
        return HostReport(rows, float(record["time_s"]) - received_s)
    except (ValueError, TypeError, KeyError):
        return None


def judge_host_clock(ahead_s: float) -> list[Row]:
    """Row of a host's clock, compared with this machine's."""
    if abs(ahead_s) <= CLOCK_LIMIT_S:
        return [Row("clock here", "ok", "agrees with this machine's clock")]
    which = "ahead of" if ahead_s > 0 else "behind"
    text = f"{abs(ahead_s):.0f} s {which} this machine's clock"
    return [
        Row("clock here", "warning", text, "Turn on time synchronization on all hosts: sudo timedatectl set-ntp true")
    ]


def _examine(host: Host, ssh: SshSettings, arguments: Sequence[str]) -> Sequence[Row]:
    command = ssh_command(host, ssh, silence_s=_SILENCE_S, module=["pipekit", "doctor", "--json", *arguments])
    advice = f"Try: ssh {host.name} true. It must succeed without a password; see docs/multi-node.md."
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_EXAMINE_S)
    except subprocess.TimeoutExpired:
        return [Row("ssh", "bad", f"no answer within {_EXAMINE_S:.0f} s", advice)]
    except OSError as error:
        return [Row("ssh", "bad", f"ssh cannot be started: {error.strerror}", "Install OpenSSH's client.")]
    report = parse_report(done.stdout.decode(errors="replace"), received_s=time.time())
    if report is None:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        if done.returncode != 255:  # the exit code of ssh itself
            advice = "pipekit must be installed there, for the Python that --python names, and found in this folder."
        return [Row("ssh", "bad", f"failed with exit code {done.returncode}: {said[-1]}", advice)]
    return [*report.rows, *judge_host_clock(report.ahead_s)]
