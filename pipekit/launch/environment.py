"""Rank of this process, read from the variables that launchers set, each under names of its own."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipekit.errors import LaunchError

Environ = Mapping[str, str]

LOCALHOST = "127.0.0.1"

# Below 32768, where Linux begins to hand out ports to outgoing connections.
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
# Of MPI's launchers, the names of rank, world size, local rank and local world size.
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class RankEnvironment:
    """The place of this process among those that a launcher has started.

    Args:
        launcher: who started it, for messages: "torchrun", "mpirun", "mpiexec" or "srun".
        rank: global rank.
        world_size: number of processes.
        local_rank: rank among the processes of this machine.
        local_world_size: number of processes of this machine; None where the launcher does not tell.
        master_addr: host name or address of rank 0.
        master_port: port on which rank 0 listens.
        restarts: how often the launcher has started the ranks again; its store may still hold what those before wrote.
        has_store: whether the launcher itself listens on that port for the ranks.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    master_addr: str
    master_port: int
    restarts: int = 0
    has_store: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(
                f"{self.launcher} gave rank {self.rank} in a world of {self.world_size}: a rank must be at least 0 and "
                "below the number of processes; unset the variables left over from an earlier launch"
            )
        if self.local_world_size is not None and not 0 <= self.local_rank < self.local_world_size:
            raise LaunchError(
                f"{self.launcher} gave local rank {self.local_rank} of {self.local_world_size} on this machine: it "
                "must be at least 0 and below that; unset the variables left over from an earlier launch"
            )

    @property
    def loopback_port(self) -> int | None:
        """The port on which this rank is to listen on the loopback alone, since all ranks are on its machine."""
        is_local = self.local_world_size == self.world_size and self.master_addr in (LOCALHOST, "localhost")
        return self.master_port if is_local and self.rank == 0 and not self.has_store else None

    def as_environ(self) -> dict[str, str]:
        """Return the variables that `torch.distributed` reads under `init_method="env://"`.

        `LOCAL_WORLD_SIZE` is left out where it is not known.

        Example:
            >>> RankEnvironment("srun", 1, 4, 1, 2, "node01", 29500).as_environ()["MASTER_ADDR"]
            'node01'
        """
        variables = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }
        if self.local_world_size is not None:
            variables["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        return variables


def detect_ranks(environ: Environ) -> RankEnvironment | None:
    """Return this process's place in its launch, or None if it was started on its own.

    The launchers are torchrun and deepspeed, Open MPI, MPICH and Intel MPI, and SLURM's srun. The shell or batch
    script of a SLURM allocation is not a launch: only srun sets `SLURM_STEP_ID`, and a step of one task has no
    other process to join.

    Raises:
        LaunchError: if some of a launcher's variables are missing, or they contradict each other.

    Example:
        >>> detect_ranks({"HOME": "/root"}) is None
        True
        >>> variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
        >>> detect_ranks({**variables, "MASTER_ADDR": "node01", "MASTER_PORT": "29500"}).rank
        1
    """
    if "RANK" in environ or "LOCAL_RANK" in environ:
        return _from_torchrun(environ)
    if "OMPI_COMM_WORLD_RANK" in environ or "OMPI_COMM_WORLD_SIZE" in environ:
        return _from_mpi(environ, "mpirun", _OPEN_MPI, passes_by="-x")
    # srun also speaks PMI, and tells more; but mpiexec inside an allocation uses srun to start its helpers, one a node.
    if ("PMI_RANK" in environ or "PMI_SIZE" in environ) and not _pmi_is_srun(environ):
        return _from_mpi(environ, "mpiexec", _PMI, passes_by="-genv")
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _from_srun(environ)
    if "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    return None


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list, without asking scontrol.

    Example:
        >>> first_host("node[01-04,07],login1")
        'node01'
        >>> first_host("gpu-[3,5]-ib")
        'gpu-3-ib'
    """
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if match is None:
        raise LaunchError(f"SLURM_JOB_NODELIST={nodelist!r} names no host; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def tasks_on_node(tasks_per_node: str, node_idx: int) -> int | None:
    """Number of tasks of one node, from SLURM's short form; None if the form leaves the node out.

    Example:
        >>> [tasks_on_node("4(x2),1", node) for node in range(4)]
        [4, 4, 1, None]
    """
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(repeats or 1)
    return counts[node_idx] if node_idx < len(counts) else None


def _from_torchrun(environ: Environ) -> RankEnvironment:
    _require("torchrun", environ, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    return RankEnvironment(
        launcher="torchrun",
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        # deepspeed's launcher says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE.
        local_world_size=_first_integer(environ, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
        master_addr=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
        restarts=_first_integer(environ, ("TORCHELASTIC_RESTART_COUNT",)) or 0,
        has_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_mpi(environ: Environ, launcher: str, names: Sequence[str], *, passes_by: str) -> RankEnvironment:
    """Read rank, world size, local rank and local world size from the variables of these names."""
    _require(launcher, environ, names)
    rank, world_size, local_rank, local_world_size = (_integer(environ, name) for name in names)
    if "MASTER_ADDR" in environ:
        master_addr = environ["MASTER_ADDR"]
    elif local_world_size == world_size:
        master_addr = LOCALHOST
    elif "SLURM_JOB_NODELIST" in environ:
        master_addr = first_host(environ["SLURM_JOB_NODELIST"])
    else:
        raise LaunchError(
            "MASTER_ADDR is not set, and MPI does not tell on which machine rank 0 runs: ranks on several "
            f"machines need it; type {launcher} {passes_by} MASTER_ADDR=<host of rank 0>"
        )
    port = _master_port(environ)
    return RankEnvironment(launcher, rank, world_size, local_rank, local_world_size, master_addr, port)


def _from_srun(environ: Environ) -> RankEnvironment | None:
    # A step may be smaller than its allocation, so the step's own numbers come first.
    world_size = _first_integer(environ, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    if world_size == 1:
        return None
    nodelist = next((environ[n] for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if n in environ), None)
    required = ["SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID"]
    if world_size is None:
        required.append("SLURM_NTASKS")
    if nodelist is None and "MASTER_ADDR" not in environ:
        required.append("SLURM_JOB_NODELIST")
    _require("srun", environ, required)
    assert world_size is not None
    tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return RankEnvironment(
        launcher="srun",
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks_on_node(tasks_per_node, _first_integer(environ, ("SLURM_NODEID",)) or 0),
        master_addr=environ.get("MASTER_ADDR") or first_host(nodelist or ""),
        master_port=_master_port(environ),
    )


def _pmi_is_srun(environ: Environ) -> bool:
    return (
        "SLURM_STEP_ID" in environ
        and environ.get("PMI_RANK") == environ.get("SLURM_PROCID")
        and "MPI_LOCALRANKID" not in environ
    )


def _master_port(environ: Environ) -> int:
    """Port that is the same for every rank of a job, and rarely the same for two jobs on one machine."""
    if "MASTER_PORT" in environ:
        return _integer(environ, "MASTER_PORT")
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID") if "SLURM_JOB_ID" in environ else ("PMIX_NAMESPACE", "PBS_JOBID")
    job = ".".join(environ.get(name, "") for name in names)
    return _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS


def _require(launcher: str, environ: Environ, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        hint = " ".join(name for name in names if name in environ) or " ".join(names)
        raise LaunchError(
            f"not set: {', '.join(missing)}, though this process seems to have been started by {launcher}, which sets "
            f"{', '.join(names)}; set what is missing, or unset {hint} to start without a launcher"
        )


def _integer(environ: Environ, name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"{name}={environ[name]!r} must be a whole number; unset it or correct it") from None


def _first_integer(environ: Environ, names: Sequence[str]) -> int | None:
    return next((_integer(environ, name) for name in names if name in environ), None)
