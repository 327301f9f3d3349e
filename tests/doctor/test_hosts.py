"""Examination of several hosts, over a stand-in for ssh."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from pipekit.doctor.hosts import examine_hosts, examine_together, judge_host_clock, parse_report
from pipekit.doctor.rows import Row
from pipekit.launch.hosts import Host
from pipekit.launch.ssh import SshSettings

HOSTS = [Host("alpha", (0,)), Host("beta", (0,))]
ROW = Row("tide", "warning", "high", "Run.", family="sea")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SshSettings:
    """ssh that runs `tmp_path/<host>` with the command in $command."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(f'#!/bin/bash\nhost="${{@: -2:1}}" command="${{@: -1}}"\n. "{tmp_path}/$host"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return SshSettings(tmp_path, sys.executable, python_path=os.pathsep.join(sys.path))


def test_each_host_tells_of_itself_or_why_it_is_not_reached(settings: SshSettings) -> None:
    report = json.dumps({"time_s": 0.0, "rows": [ROW.to_record()]})
    (settings.folder / "alpha").write_text(
        f"echo Welcome; echo \"$command\" > {settings.folder}/asked; echo '{report}'"
    )
    (settings.folder / "beta").write_text("echo 'ssh: connect to host beta port 22: Connection refused' >&2; exit 255")
    found = examine_hosts(HOSTS, settings, ["--dir", "my runs"])
    asked = (settings.folder / "asked").read_text().strip()
    assert asked.endswith("-m pipekit doctor --json --dir 'my runs'")
    assert found["alpha"][0] == ROW
    assert [(row.check, row.verdict) for row in found["alpha"][1:]] == [("clock here", "warning")]
    (row,) = found["beta"]
    assert (row.check, row.verdict) == ("ssh", "bad")
    assert "exit code 255" in row.found
    assert "Connection refused" in row.found
    assert row.advice.startswith("Try: ssh beta true.")


def test_a_host_without_pipekit_is_told_apart_from_one_that_is_not_reached(settings: SshSettings) -> None:
    for host in HOSTS:
        (settings.folder / host.name).write_text("echo 'No module named pipekit' >&2; exit 1")
    found = examine_hosts(HOSTS, settings, [])
    assert found["beta"][0].advice.startswith("pipekit must be installed there")


def test_a_report_is_read_after_what_a_login_shell_prints() -> None:
    text = json.dumps({"time_s": 100.0, "rows": [ROW.to_record()]})
    report = parse_report(f"Welcome to alpha {{}}\n{text}\n", received_s=98.0)
    assert report is not None
    assert (report.rows, report.ahead_s) == ([ROW], 2.0)
    for broken in (
        "",
        text[:-3],
        '{"time_s": 1}',
        '{"time_s": 1, "rows": [{"check": "x"}]}',
        '{"time_s": 1, "rows": 3}',
    ):
        assert parse_report(broken, received_s=0.0) is None


def test_clocks_are_compared() -> None:
    assert judge_host_clock(0.5)[0].verdict == "ok"
    assert judge_host_clock(-60.0)[0].found == "60 s behind this machine's clock"


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_of_all_hosts_measure_together(settings: SshSettings, tmp_path: Path) -> None:
    for host in HOSTS:
        (tmp_path / host.name).write_text('eval "$command"')
    environ = {"CUDA_VISIBLE_DEVICES": ""}
    versions, reduce, send = examine_together(HOSTS, settings, environ, tmp_path / "logs", None)
    assert (versions.check, versions.verdict) == ("versions", "ok")
    assert (reduce.check, send.check) == ("2 ranks on 2 hosts: all-reduce", "2 ranks on 2 hosts: send")
    assert reduce.measured["is_right"]


def test_hosts_that_differ_or_lose_each_other_are_bad(settings: SshSettings, tmp_path: Path) -> None:
    (tmp_path / "alpha").write_text("exit 255")
    (tmp_path / "beta").write_text("exit 255")
    (row,) = examine_together(HOSTS, settings, {}, tmp_path / "logs", None)
    assert (row.check, row.verdict) == ("2 ranks on 2 hosts", "bad")
    assert row.found.startswith("alpha: cannot be reached")
