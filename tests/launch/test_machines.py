"""`pipekit launch` on several machines: what is refused before anything starts, other launchers, and no ssh at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipekit.commands.launch import command
from pipekit.errors import ExitCode, PipekitError
from pipekit.launch import machines, restarts
from pipekit.launch.fleet import FleetRun, HostError
from pipekit.launch.hosts import Host
from pipekit.launch.machines import MachineOptions, launch_on_hosts
from pipekit.launch.ports import choose_port

SCRIPT = """
import os
print(*(os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SEED")))
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hosts").write_text("alpha slots=1\nbeta slots=2\n")
    (tmp_path / "own.py").write_text(SCRIPT)
    config = {"model": {"preset": "tiny"}, "parallel": {"pp": 2}, "train": {"steps": 2, "sequence_length": 16}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "bin").mkdir()
    for program in ("ssh", "mpirun"):
        text = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
        (tmp_path / "bin" / program).write_text(text)
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("script", "arguments", "options", "message"),
    [
        ("train", ["c.yaml"], {}, "give --hostfile FILE, or type pipekit train to run here"),
        ("own.py", [], {"include": "alpha"}, "--include chooses among the hosts of --hostfile"),
        ("own.py", [], {"hostfile": Path("hosts"), "nnodes": 2}, "--hostfile starts processes on all machines"),
        ("own.py", [], {"hostfile": Path("hosts"), "processes": 2}, "use --num_gpus 2"),
        ("own.py", [], {"hostfile": Path("hosts"), "include": "gamma"}, "the hostfile has no host 'gamma'"),
        ("trian", ["c.yaml"], {"hostfile": Path("hosts")}, "trian: no such file; give train and a configuration"),
        ("train", [], {"hostfile": Path("hosts")}, "train: give the YAML file of the run"),
        ("train", ["c.yaml"], {"hostfile": Path("hosts")}, "parallel.pp=2"),
        ("train", ["c.yaml", "tarin.steps=1"], {"hostfile": Path("hosts")}, "did you mean 'train'"),
        ("own.py", [], {"hostfile": Path("hosts"), "master_addr": "-oX"}, "--master_addr '-oX' is no address"),
        ("own.py", [], {"hostfile": Path("hosts"), "master_port": 0}, "--master_port 0 must be between 1 and 65535"),
        ("own.py", [], {"hostfile": Path("hosts"), "ssh_args": "-F 'x"}, "--ssh_args .* No closing quotation"),
        ("own.py", [], {"hostfile": Path("hosts"), "export": ["RANK=1"]}, "RANK is set for each process"),
        ("own.py", [], {"hostfile": Path("hosts"), "launcher": "mpich"}, "use --num_gpus 1, or --launcher ssh"),
        ("own.py", [], {"nnodes": 2}, "give --master_addr ADDRESS, the same on all"),
        ("own.py", [], {"nnodes": 2, "node_rank": 2, "master_addr": "x"}, "--node_rank 2 must be between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    workspace: Path, script: str, arguments: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipekitError, match=message):
        command(script, arguments, **options)
    assert not (workspace / "runs").exists()


def run(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipekit", "launch", *arguments], cwd=cwd, text=True, stdout=subprocess.PIPE
    )


@pytest.mark.distributed
def test_another_launcher_is_shown_and_takes_over(workspace: Path) -> None:
    options = ["--hostfile", "hosts", "--launcher", "openmpi", "--launcher-args", "--tag-output", "-x", "SEED=3"]
    out, _ = run(*options, "own.py", "--its-own", cwd=workspace).communicate(timeout=120)
    shown, given = out.splitlines()
    arguments = json.loads(given)
    assert shown.startswith("mpirun -n 3 --host alpha:1,beta:2 --wdir ")
    assert arguments[:4] == ["-n", "3", "--host", "alpha:1,beta:2"]
    assert arguments[6] == "--tag-output"
    assert "SEED=3" in arguments
    assert arguments[-4:] == [sys.executable, "-u", "own.py", "--its-own"]


@pytest.mark.distributed
def test_each_of_several_machines_starts_its_own_ranks_without_ssh(workspace: Path) -> None:
    options = ["--nnodes", "2", "--num-gpus", "2", "--device", "cpu", "--master-addr", "127.0.0.1", "-x", "SEED=7"]
    options += ["--master-port", str(choose_port(None))]
    machines = [run(*options, "--node-rank", str(node), "own.py", cwd=workspace) for node in range(2)]
    outs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert outs == ["0 4 0 127.0.0.1 7\n", ""]
    logs = workspace / "runs/own/logs"
    found = [(logs / f"rank-{rank}.log").read_text() for rank in range(1, 4)]
    assert found == ["1 4 1 127.0.0.1 7\n", "2 4 0 127.0.0.1 7\n", "3 4 1 127.0.0.1 7\n"]


HOSTS = [Host("node01", (0,)), Host("node02", (0,))]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[FleetRun]:
    """The runs on the hosts, the first of which writes a checkpoint and loses a host."""
    started: list[FleetRun] = []

    def run_fleet(run: FleetRun) -> None:
        started.append(run)
        if len(started) == 1:
            checkpoint = tmp_path / "run/checkpoints/step-00000002"
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").touch()
            raise HostError("node02", "has not been heard of for 30 s", ExitCode.RANK_LOST)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machines, "run_fleet", run_fleet)
    monkeypatch.setattr(restarts.time, "sleep", lambda seconds: None)
    return started


def test_a_run_goes_on_from_what_was_written_since(tmp_path: Path, runs: list[FleetRun]) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {preset: tiny}\nrun: {dir: run, restarts: 1}\nparallel: {pp: 2}\ncheckpoint: {resume: elsewhere}\n"
    )
    launch_on_hosts("train", ["c.yaml", "train.steps=20"], HOSTS, MachineOptions())
    assert [run.job.arguments for run in runs] == [
        ("c.yaml", "train.steps=20"),
        ("c.yaml", "train.steps=20", "checkpoint.resume=auto"),
    ]
    assert runs[0].own_facts != runs[1].own_facts
    # The host that was lost may need its time to come back.
    assert [run.patience_s for run in runs] == [0.0, 600.0]
    (record,) = map(json.loads, (tmp_path / "run/failures.jsonl").read_text().splitlines())
    assert (record["host"], record["checkpoint"]) == ("node02", "step-00000002")


def test_a_script_is_started_again_as_it_was(tmp_path: Path, runs: list[FleetRun]) -> None:
    (tmp_path / "train.py").touch()
    with pytest.raises(HostError, match="node02: has not been heard of"):
        launch_on_hosts("train.py", ["--lr", "1"], HOSTS, MachineOptions())
    del runs[0]
    (tmp_path / "run/checkpoints/step-00000002/manifest.json").unlink()
    (tmp_path / "run/checkpoints/step-00000002").rmdir()
    launch_on_hosts("train.py", ["--lr", "1"], HOSTS, MachineOptions(restarts=1))
    assert [run.job.arguments for run in runs] == [("--lr", "1")] * 2
