"""Runs on several hosts, over a stand-in for ssh: what the launcher makes of what hosts say, and of their silence.

Most hosts here are a few lines of shell that speak as an agent does; some are agents with their ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipekit.errors import ExitCode, LaunchError, StoppedError
from pipekit.hangs.heartbeat import Heartbeat, heartbeat_file
from pipekit.launch.failures import HangError
from pipekit.launch.fleet import FleetRun, HostError, run_fleet
from pipekit.launch.hosts import Host
from pipekit.launch.node import NodeJob
from pipekit.launch.ssh import SshSettings
from pipekit.signals import Interrupted

SAY_FACTS = """say '{"facts": {"the code of pipekit": "1"}, "time_s": '$(date +%s)', "address": null}'"""
SAY_MASTER = """say '{"master": ["10.0.0.1", 4242]}'"""
SAY_DONE = """say '{"ended": {"exit_code": 0, "kind": "done"}}'"""
READY = f"hear job; {SAY_FACTS}; hear choose; {SAY_MASTER}; hear start"
READY_SECOND = f"hear job; {SAY_FACTS}; hear start"


def ended(kind: str, message: str, exit_code: int = 3) -> str:
    return f"""say '{{"ended": {{"exit_code": {exit_code}, "kind": "{kind}", "message": "{message}"}}}}'"""


def failing(kind: str) -> str:
    return f"""say '{{"failing": {{"rank": 1, "kind": "{kind}"}}}}'"""


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    return Fleet(tmp_path, monkeypatch)


class Fleet:
    """Hosts `alpha` and `beta`, reached by a stand-in for ssh that runs `tmp_path/<host>`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        ssh = folder / "bin" / "ssh"
        ssh.write_text(
            "#!/bin/bash\n"
            'host="${@: -2:1}" command="${@: -1}"\n'
            'say() { echo "pipekit:$1"; }\n'
            'hear() { while read -r line; do [[ "$line" == *"\\"$1\\""* ]] && return; done; exit; }\n'
            f'. "{folder}/$host"\n'
        )
        ssh.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")

    def run(self, alpha: str, beta: str, *, timeout_s: float = 20.0, patience_s: float = 0.0) -> None:
        (self.folder / "alpha").write_text(alpha)
        (self.folder / "beta").write_text(beta)
        job = NodeJob("own.py", (), (), "cpu", log_dir="logs", timeout_s=timeout_s)
        settings = SshSettings(self.folder, sys.executable, python_path=os.environ.get("PYTHONPATH"))
        hosts = (Host("alpha", (0,)), Host("beta", (0,)))
        run_fleet(FleetRun(hosts, job, settings, self.folder / "logs", patience_s=patience_s))

    def log(self, host: str) -> str:
        return (self.folder / "logs" / f"{host}.log").read_text()


def test_what_hosts_write_goes_to_the_terminal_and_to_their_logs(
    fleet: Fleet, capfd: pytest.CaptureFixture[str]
) -> None:
    out = """say '{"out": "step 1\\n"}'; say '{"log": "rank 0: chatter\\n"}'; echo from a login shell"""
    fleet.run(f"{READY}; {out}; {SAY_DONE}", f"{READY_SECOND}; {SAY_DONE}")
    assert capfd.readouterr().out == "step 1\n"
    assert fleet.log("alpha") == "rank 0: chatter\nfrom a login shell\n"
    assert not (fleet.folder / "logs/beta.log").exists()


def test_a_host_that_cannot_be_reached_is_named_with_what_ssh_said_before_anything_starts(fleet: Fleet) -> None:
    refused = "echo 'ssh: connect to host beta port 22: Connection refused' >&2; exit 255"
    with pytest.raises(HostError) as caught:
        fleet.run(f"hear job; {SAY_FACTS}; hear start; touch {fleet.folder}/started", refused)
    assert str(caught.value) == (
        "beta: cannot be reached: ssh ended with exit code 255, and said:\n"
        "ssh: connect to host beta port 22: Connection refused"
    )
    assert caught.value.exit_code == ExitCode.RANK_LOST
    assert not (fleet.folder / "logs").exists()
    assert not (fleet.folder / "started").exists()


def test_a_host_that_comes_back_in_time_is_waited_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipekit.launch.fleet._RETRY_S", 0.1)
    late = f"[ -e {fleet.folder}/tried ] || {{ touch {fleet.folder}/tried; exit 255; }}; "
    fleet.run(f"{READY}; {SAY_DONE}", f"{late}{READY_SECOND}; {SAY_DONE}", patience_s=20)


def test_hosts_that_differ_are_refused_before_anything_starts(fleet: Fleet) -> None:
    with pytest.raises(LaunchError, match=r"^beta: the code of pipekit differs from that of alpha; copy it"):
        fleet.run(READY, READY_SECOND.replace('"1"', '"2"'))


def test_a_clock_that_is_wrong_causes_a_warning(fleet: Fleet, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = READY_SECOND.replace("$(date +%s)", "$(($(date +%s) - 100))")
    fleet.run(f"{READY}; {SAY_DONE}", f"{wrong}; {SAY_DONE}")
    warning = capfd.readouterr().err
    assert warning.startswith("warning: beta: its clock is 10")
    assert " s behind this machine's" in warning


def test_a_mistake_on_a_host_is_its_message(fleet: Fleet) -> None:
    with pytest.raises(HostError, match=r"^beta: c.yaml: no such file$") as caught:
        fleet.run(READY, f"hear job; {ended('user', 'c.yaml: no such file', 2)}")
    assert caught.value.exit_code == ExitCode.MISTAKE


def test_the_cause_is_named_and_not_the_hosts_that_lost_contact_by_it(fleet: Fleet) -> None:
    # alpha's rank loses its peer first, by the clock of whoever listens.
    alpha = f"{READY}; {failing('peer')}; {ended('peer', 'rank 0 lost contact')}"
    beta = f"{READY_SECOND}; sleep 0.5; {failing('crash')}; {ended('crash', 'rank 1 failed: ZeroDivisionError')}"
    with pytest.raises(HostError, match=r"^beta: rank 1 failed: ZeroDivisionError$"):
        fleet.run(alpha, beta)


def test_when_one_host_fails_the_others_are_told_to_end(fleet: Fleet) -> None:
    alpha = f"{READY}; hear end; touch {fleet.folder}/told; {ended('signal', '', 143)}"
    beta = f"{READY_SECOND}; {failing('killed')}; {ended('killed', 'rank 1 was killed')}"
    with pytest.raises(HostError, match=r"^beta: rank 1 was killed$"):
        fleet.run(alpha, beta)
    assert (fleet.folder / "told").exists()


def test_a_lost_connection_is_the_failure_of_its_host(fleet: Fleet) -> None:
    beta = f"{READY_SECOND}; echo 'Timeout, server beta not responding.' >&2; exit 255"
    with pytest.raises(HostError, match=r"^beta: lost: ssh ended with exit code 255, and said:\nTimeout, server beta"):
        fleet.run(f"{READY}; hear end; {ended('signal', '', 143)}", beta)
    assert "Timeout, server beta" in fleet.log("beta")


def test_a_silent_host_is_named_at_the_limit(fleet: Fleet) -> None:
    beat = "while sleep 0.3; do say '{\"beat\": 1}'; done & hear end; kill $!; "
    began_s = time.monotonic()
    with pytest.raises(HostError, match=r"^beta: has not been heard from for 1 s; is it up, and its network\?$"):
        fleet.run(f"{READY}; {beat}{ended('signal', '', 143)}", f"{READY_SECOND}; exec sleep 60", timeout_s=1.4)
    assert time.monotonic() - began_s < 10


STOPPED = ended("stopped", "stopped after step 3", 75)
BY_SIGNAL = ended("signal", "")
DISK_FULL = ended("user", "no space left", 5)


@pytest.mark.parametrize(
    ("alpha", "beta", "error", "message", "exit_code"),
    [
        (STOPPED, STOPPED, StoppedError, "stopped after step 3", ExitCode.STOPPED),
        (STOPPED, SAY_DONE, StoppedError, "stopped after step 3", ExitCode.STOPPED),
        (STOPPED, BY_SIGNAL, Interrupted, "stopped by SIGTERM: ended 2 hosts", 143),
        (BY_SIGNAL, "exit 255", Interrupted, "stopped by SIGTERM: ended 2 hosts", 143),
        # What has kept a rank from saving is told, and not what it has done to the others.
        (ended("peer", "rank 0 lost contact"), DISK_FULL, HostError, "beta: no space left", ExitCode.STORAGE),
        (SAY_DONE, SAY_DONE, None, "", 0),
    ],
)
def test_a_signal_is_passed_on_and_the_end_is_what_the_ranks_make_of_it(
    fleet: Fleet, alpha: str, beta: str, error: type[BaseException] | None, message: str, exit_code: int
) -> None:
    def send() -> None:
        while not (fleet.folder / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    with contextlib.nullcontext() if error is None else pytest.raises(error) as caught:
        fleet.run(f"{READY}; touch {fleet.folder}/ready; hear signal; {alpha}", f"{READY_SECOND}; hear signal; {beta}")
    sender.join()
    if caught is not None:
        assert str(caught.value) == message
        assert caught.value.exit_code == exit_code


def test_ranks_that_were_ended_by_another_on_their_host_are_a_failure(fleet: Fleet) -> None:
    beta = f'{READY_SECOND}; say \'{{"ended": {{"exit_code": 143, "kind": "signal"}}}}\''
    with pytest.raises(HostError, match=r"^beta: its ranks were ended by a signal on that host$"):
        fleet.run(f"{READY}; hear end; {ended('signal', '', 143)}", beta)


def test_a_hang_is_told_by_the_heartbeats_of_all_hosts_where_the_folder_is_shared(fleet: Fleet) -> None:
    beat = Heartbeat(rank=0, phase="step 3", doing="receiving the output of 0F1", doing_s=9.0, is_waiting=True)
    (fleet.folder / "logs").mkdir()
    for number, heard in enumerate([replace(beat, waits_for=(1,)), replace(beat, rank=1, doing="computing 1F1")]):
        still = replace(heard, is_waiting=number == 0)
        heartbeat_file(fleet.folder / "logs", number).write_text(json.dumps(asdict(still)))
    # alpha's launcher knows its own rank alone.
    alpha = f"{READY}; sleep 1; {ended('hang', 'the run hangs: every rank waits for another', 4)}"
    with pytest.raises(HangError) as caught:
        fleet.run(alpha, f"{READY_SECOND}; hear end; {ended('signal', '', 143)}", timeout_s=10.0)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("the run hangs: rank 1 waits for nobody, and has been computing 1F1 for ")
    assert lines[-5:-2] == ["host  ranks", "alpha  0", "beta  1"]
    assert caught.value.exit_code == ExitCode.HANG


def test_a_run_that_stops_by_itself_is_waited_for_on_all_hosts(fleet: Fleet) -> None:
    alpha = f"{READY}; {ended('stopped', 'stopped after step 3', 75)}"
    beta = f"{READY_SECOND}; sleep 0.5; touch {fleet.folder}/whole; {ended('stopped', 'stopped after step 3', 75)}"
    with pytest.raises(StoppedError, match=r"^stopped after step 3$"):
        fleet.run(alpha, beta)
    assert (fleet.folder / "whole").exists()


AGENT = 'exec env -u SSH_CONNECTION sh -c "$command"'
SCRIPT = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
print("rank", rank, "of", os.environ["WORLD_SIZE"], flush=True)
print("noise of", rank, file=sys.stderr, flush=True)
pathlib.Path(f"pid-{rank}").write_text(str(os.getpid()))
if os.path.exists("fail") and rank == "1":
    while not os.path.exists("pid-0"):
        time.sleep(0.01)
    raise ZeroDivisionError("rank 1 divides by zero")
if os.path.exists("fail") or os.path.exists("wait"):
    time.sleep(300)
"""


def is_gone(pid: int, *, within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.distributed
def test_agents_start_their_ranks_and_end_them_when_one_fails(
    fleet: Fleet, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fleet.folder)
    (fleet.folder / "own.py").write_text(SCRIPT)
    (fleet.folder / "fail").touch()
    with pytest.raises(HostError) as caught:
        fleet.run(AGENT, AGENT)
    assert str(caught.value).startswith("beta: rank 1 failed: ZeroDivisionError: rank 1 divides by zero\n")
    assert str(caught.value).endswith(f"the whole log of rank 1: {fleet.folder}/logs/rank-1.log")
    assert capfd.readouterr().out == "rank 0 of 2\n"
    assert "rank 0: noise of 0\n" in fleet.log("alpha")
    assert fleet.log("beta").startswith("rank 1: rank 1 of 2\nrank 1: noise of 1\n")
    assert is_gone(int((fleet.folder / "pid-0").read_text()), within_s=0)
    assert sorted(path.name for path in (fleet.folder / "logs").iterdir()) == [
        *("alpha.log", "beta.log", "rank-0.log", "rank-1.log")
    ]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_launcher_is_gone_so_are_the_ranks(fleet: Fleet, signum: signal.Signals) -> None:
    for host in ("alpha", "beta"):
        (fleet.folder / host).write_text(AGENT)
    (fleet.folder / "own.py").write_text(SCRIPT)
    (fleet.folder / "wait").touch()
    (fleet.folder / "hosts").write_text("alpha slots=1\nbeta slots=1\n")
    command = [sys.executable, "-m", "pipekit", "launch", "-H", "hosts", "--device", "cpu", "own.py"]
    launcher = subprocess.Popen(command, cwd=fleet.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    pids = [fleet.folder / f"pid-{rank}" for rank in range(2)]
    deadline_s = time.monotonic() + 120
    while not all(path.exists() and path.read_text() for path in pids):
        assert launcher.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    launcher.send_signal(signum)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == (-9 if signum == signal.SIGKILL else 143)
    assert all(is_gone(int(path.read_text()), within_s=120) for path in pids)
    if signum == signal.SIGTERM:
        assert errors == "stopped by SIGTERM: ended 2 hosts\n"
