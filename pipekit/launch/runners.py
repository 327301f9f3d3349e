"""Command lines of other launchers of several machines: PDSH, Open MPI, MPICH and SLURM.

They start the processes, which then find their ranks in the environment.

Source: deepspeed/launcher/multinode_runner.py; the manuals of pdsh, mpirun (Open MPI), mpiexec (Hydra) and srun.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipekit.errors import LaunchError
from pipekit.launch.hosts import Host
from pipekit.launch.node import NodeJob
from pipekit.launch.ssh import SshSettings

_FAN_OUT = 1024


@dataclass(frozen=True)
class RunnerJob:
    """Job for a launcher of several machines.

    Attributes:
        hosts: the hosts, in the order of their ranks.
        job: what each does.
        ssh: the working directory, and the Python that runs there.
        master_addr: address of the first host.
        master_port: port on which rank 0 listens.
        arguments: more arguments of the launcher.
    """

    hosts: Sequence[Host]
    job: NodeJob
    ssh: SshSettings
    master_addr: str
    master_port: int
    arguments: Sequence[str] = ()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return sum(len(host.slots) for host in self.hosts)

    @property
    def environ(self) -> dict[str, str]:
        """Variables that every process gets."""
        return {**self.job.environ, "MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}

    @property
    def rank_command(self) -> list[str]:
        """The command of one rank."""
        if self.job.command == "train":
            return [self.ssh.python, "-m", "pipekit", "train", *self.job.arguments]
        return [self.ssh.python, "-u", self.job.command, *self.job.arguments]


@dataclass(frozen=True)
class RunnerCommand:
    """A launcher's command line, and the variables to set for it."""

    arguments: list[str]
    environ: Mapping[str, str]


def runner_command(launcher: str, job: RunnerJob) -> RunnerCommand:
    """The command line with which a launcher starts a job.

    Args:
        launcher: "pdsh", "openmpi", "mpich" or "slurm".
        job: what to start.

    Raises:
        LaunchError: if this launcher cannot start it on these slots.
    """
    return _RUNNERS[launcher](job)


def _pdsh(job: RunnerJob) -> RunnerCommand:
    message = job.job.to_message() | {
        "hosts": [list(host.slots) for host in job.hosts],
        "master_addr": job.master_addr,
        "master_port": job.master_port,
    }
    del message["slots"]
    # No shell and no escape of pdsh's, such as %h, finds anything of its own in it.
    text = base64.urlsafe_b64encode(json.dumps(message).encode()).decode()
    python_path = [] if job.ssh.python_path is None else ["env", f"PYTHONPATH={job.ssh.python_path}"]
    agent = shlex.join([*python_path, job.ssh.python, "-m", "pipekit.launch.node", text])
    names = ",".join(host.name for host in job.hosts)
    # pdsh puts the number of the host in place of %n.
    remote = f"cd {shlex.quote(str(job.ssh.folder))} && exec {agent} %n"
    ssh_arguments = shlex.join([*job.ssh.arguments, *([] if job.ssh.port is None else ["-p", str(job.ssh.port)])])
    environ = {"PDSH_RCMD_TYPE": "ssh"} | ({"PDSH_SSH_ARGS_APPEND": ssh_arguments} if ssh_arguments else {})
    return RunnerCommand(["pdsh", "-S", "-f", str(_FAN_OUT), "-w", names, *job.arguments, remote], environ)


def _openmpi(job: RunnerJob) -> RunnerCommand:
    _check_first_slots(job, "Open MPI")
    hosts = ",".join(f"{host.name}:{len(host.slots)}" for host in job.hosts)
    exports = [argument for name, value in job.environ.items() for argument in ("-x", f"{name}={value}")]
    command = ["mpirun", "-n", str(job.world_size), "--host", hosts, "--wdir", str(job.ssh.folder)]
    return RunnerCommand([*command, *job.arguments, *exports, *job.rank_command], {})


def _mpich(job: RunnerJob) -> RunnerCommand:
    per_node = _check_equal_slots(job, "MPICH")
    names = ",".join(host.name for host in job.hosts)
    exports = [argument for name, value in job.environ.items() for argument in ("-genv", name, value)]
    command = ["mpiexec", "-n", str(job.world_size), "-ppn", str(per_node), "-hosts", names]
    return RunnerCommand([*command, "-wdir", str(job.ssh.folder), *job.arguments, *exports, *job.rank_command], {})


def _slurm(job: RunnerJob) -> RunnerCommand:
    per_node = _check_equal_slots(job, "SLURM")
    command = [
        "srun",
        "-n",
        str(job.world_size),
        "--nodes",
        str(len(job.hosts)),
        "--ntasks-per-node",
        str(per_node),
        "--nodelist",
        ",".join(host.name for host in job.hosts),
        "--chdir",
        str(job.ssh.folder),
        "--kill-on-bad-exit=1",
        # Values may have commas, which a list of variables may not.
        "--export=ALL",
    ]
    return RunnerCommand([*command, *job.arguments, *job.rank_command], job.environ)


_RUNNERS: dict[str, Callable[[RunnerJob], RunnerCommand]] = {
    "pdsh": _pdsh,
    "openmpi": _openmpi,
    "mpich": _mpich,
    "slurm": _slurm,
}


def _check_first_slots(job: RunnerJob, name: str) -> None:
    for host in job.hosts:
        if list(host.slots) != list(range(len(host.slots))):
            raise LaunchError(
                f"{name} counts the processes of a host and cannot choose among its slots, and of {host.name} slots "
                f"{', '.join(map(str, host.slots))} are to be used; take the first ones, or --launcher ssh"
            )


def _check_equal_slots(job: RunnerJob, name: str) -> int:
    _check_first_slots(job, name)
    first, *others = job.hosts
    for host in others:
        if len(host.slots) != len(first.slots):
            raise LaunchError(
                f"{name} starts the same number of processes on each host, and {first.name} has {len(first.slots)} "
                f"slots and {host.name} {len(host.slots)}; use --num_gpus {min(len(h.slots) for h in job.hosts)}, "
                "or --launcher ssh"
            )
    return len(first.slots)
