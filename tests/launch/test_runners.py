"""Command lines of other launchers, beside those that DeepSpeed builds, and run by stand-ins."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipekit.errors import LaunchError
from pipekit.launch.hosts import Host
from pipekit.launch.node import NodeJob
from pipekit.launch.ports import choose_port
from pipekit.launch.runners import RunnerJob, runner_command
from pipekit.launch.ssh import SshSettings, ssh_command

HOSTS = (Host("worker-1", (0, 1)), Host("worker-2", (0, 1)))
ENVIRON = {"NCCL_DEBUG": "INFO"}


def runner_job(*hosts: Host, arguments: tuple[str, ...] = (), folder: Path = Path("/data/my runs")) -> RunnerJob:
    job = NodeJob("train", ("c.yaml", "data.source=it's mine"), (), "cpu", environ=ENVIRON)
    return RunnerJob(hosts or HOSTS, job, SshSettings(folder, "/opt/python"), "10.0.0.1", 29500, arguments)


def theirs(kind: str, **changes: object) -> list[str]:
    """The command line that DeepSpeed builds for the same processes of a script."""
    from deepspeed.launcher import multinode_runner

    args = argparse.Namespace(
        user_script="train.py",
        user_args=["c.yaml"],
        include="",
        exclude="",
        num_nodes=-1,
        num_gpus=-1,
        launcher=kind,
        launcher_args="",
        hostfile="hosts",
        no_python=False,
        module=False,
        no_local_rank=True,
        save_pid=False,
        enable_each_rank_log=None,
        venv_script=None,
        ssh_port=None,
        master_addr="10.0.0.1",
        master_port=29500,
    )
    vars(args).update(changes)
    pool = {"worker-1": 2, "worker-2": 2}
    if kind == "pdsh":
        runner = multinode_runner.PDSHRunner(args, "world")
    else:
        classes = {"openmpi": "OpenMPIRunner", "mpich": "MPICHRunner", "slurm": "SlurmRunner"}
        runner = getattr(multinode_runner, classes[kind])(args, "world", pool)
    for name, value in ENVIRON.items():
        runner.add_export(name, value)
    built = runner.get_cmd({}, {name: list(range(slots)) for name, slots in pool.items()})
    return built[0] if kind == "pdsh" else built


def after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_pdsh_reaches_the_same_hosts_as_deepspeeds() -> None:
    ours, their = runner_command("pdsh", runner_job()), theirs("pdsh")
    assert ours.arguments[:6] == their[:6] == ["pdsh", "-S", "-f", "1024", "-w", "worker-1,worker-2"]
    assert ours.environ == {"PDSH_RCMD_TYPE": "ssh"}
    remote = ours.arguments[6]
    assert remote.startswith("cd '/data/my runs' && exec /opt/python -m pipekit.launch.node ")
    assert remote.endswith(" %n")  # as theirs, --node_rank=%n
    assert remote.count("%") == 1


def test_open_mpi_starts_as_many_processes_as_deepspeeds() -> None:
    ours, their = runner_command("openmpi", runner_job()).arguments, theirs("openmpi")
    assert (ours[0], after(ours, "-n")) == (their[0], after(their, "-n")) == ("mpirun", "4")
    assert after(ours, "--host") == "worker-1:2,worker-2:2"
    assert "NCCL_DEBUG=INFO" in ours
    assert "NCCL_DEBUG=INFO" in their
    assert "MASTER_ADDR=10.0.0.1" in ours
    assert ours[-6:] == ["/opt/python", "-m", "pipekit", "train", "c.yaml", "data.source=it's mine"]


def test_mpich_starts_as_many_processes_as_deepspeeds() -> None:
    ours, their = runner_command("mpich", runner_job()).arguments, theirs("mpich")
    for option in ("-n", "-ppn", "-hosts"):
        assert after(ours, option) == after(their, option)
    assert ours[ours.index("MASTER_ADDR") - 1 :][:3] == ["-genv", "MASTER_ADDR", "10.0.0.1"]
    assert ours[ours.index("NCCL_DEBUG") - 1 :][:3] == ["-genv", "NCCL_DEBUG", "INFO"]


def test_srun_starts_as_many_processes_as_deepspeeds() -> None:
    ours, their = runner_command("slurm", runner_job()), theirs("slurm", include="worker-1@worker-2")
    for option in ("-n", "--nodelist", "--nodes"):
        assert after(ours.arguments, option) == after(their, option)
    assert after(ours.arguments, "--ntasks-per-node") == "2"
    # A value with a comma would end there in a list; so all go through the environment.
    assert "--export=ALL" in ours.arguments
    assert "--export=ALL,NCCL_DEBUG=INFO" in their
    assert ours.environ == {"NCCL_DEBUG": "INFO", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_arguments_of_the_launcher_stand_before_the_command() -> None:
    for launcher in ("pdsh", "openmpi", "mpich", "slurm"):
        command = runner_command(launcher, runner_job(arguments=("--their", "own"))).arguments
        place = command.index("--their")
        assert command[place + 1] == "own"
        assert any("/opt/python" in word for word in command[place:])
        assert not any("/opt/python" in word for word in command[:place])


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "slurm"])
def test_slots_that_a_launcher_cannot_choose_are_refused(launcher: str) -> None:
    with pytest.raises(LaunchError, match=r"cannot choose among its slots, and of b slots 1, 2 are to be used"):
        runner_command(launcher, runner_job(Host("a", (0, 1)), Host("b", (1, 2))))


@pytest.mark.parametrize("launcher", ["mpich", "slurm"])
def test_hosts_of_several_sizes_are_refused_where_all_must_be_alike(launcher: str) -> None:
    with pytest.raises(LaunchError, match="a has 1 slots and b 2; use --num_gpus 1, or --launcher ssh"):
        runner_command(launcher, runner_job(Host("a", (0,)), Host("b", (0, 1))))
    runner_command("openmpi", runner_job(Host("a", (0,)), Host("b", (0, 1))))


@pytest.mark.distributed
def test_a_stand_in_for_pdsh_starts_each_hosts_ranks(tmp_path: Path) -> None:
    # Each rank says what it found; the first host's and then the second's, as a shell on the host runs them.
    script = "import os, pathlib\nkeys = 'RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT SEED'\n"
    script += (
        "pathlib.Path(f\"rank-{os.environ['RANK']}\").write_text(' '.join(os.environ[key] for key in keys.split()))"
    )
    (tmp_path / "own.py").write_text(script)
    job = NodeJob("own.py", (), (), "cpu", environ={"SEED": "a b"}, log_dir="logs")
    settings = SshSettings(tmp_path, sys.executable, python_path=os.environ.get("PYTHONPATH"))
    hosts = (Host("a", (0,)), Host("b", (0, 1)))
    remote = runner_command("pdsh", RunnerJob(hosts, job, settings, "10.0.0.1", 4242)).arguments[-1]
    for number in range(2):
        subprocess.run(["sh", "-c", remote.replace("%n", str(number))], check=True, timeout=120)
    found = [(tmp_path / f"rank-{rank}").read_text() for rank in range(3)]
    assert found == ["0 3 0 10.0.0.1 4242 a b", "1 3 0 10.0.0.1 4242 a b", "2 3 1 10.0.0.1 4242 a b"]


@pytest.mark.distributed
def test_under_pdsh_a_signal_ends_a_hosts_ranks_with_its_own_exit_code(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import pathlib, time\npathlib.Path('ready').touch()\ntime.sleep(60)")
    job = NodeJob("own.py", (), (), "cpu", log_dir="logs")
    settings = SshSettings(tmp_path, sys.executable, python_path=os.environ.get("PYTHONPATH"))
    remote = runner_command("pdsh", RunnerJob((Host("a", (0,)),), job, settings, "127.0.0.1", choose_port(None)))
    agent = subprocess.Popen(["sh", "-c", remote.arguments[-1].replace("%n", "0")], stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 120
    while not (tmp_path / "ready").exists():
        assert agent.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    agent.terminate()
    assert agent.communicate(timeout=120)[1] == "stopped by SIGTERM: ended 1 processes\n"
    assert agent.returncode == 143


def test_what_goes_through_a_shell_arrives_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "it's $HOME; `x`"
    folder.mkdir()
    python = tmp_path / "python $1"
    python.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), sys.argv[1:]]))")
    python.chmod(0o755)
    settings = SshSettings(folder, str(python), port=2222, arguments=["-F", "my config"], python_path="/a b:$c")
    command = ssh_command(Host("worker-1", (0,)), settings, silence_s=30)
    assert command[:3] == ["ssh", "-F", "my config"]
    assert after(command, "-p") == "2222"
    assert "BatchMode=yes" in command
    assert command[-3:-1] == ["--", "worker-1"]
    done = subprocess.run(["sh", "-c", command[-1]], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [str(folder), ["-m", "pipekit.launch.node"]]
