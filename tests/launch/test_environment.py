"""Reading the place of a process from what each launcher sets."""

from __future__ import annotations

import pytest

from pipekit.errors import LaunchError
from pipekit.launch.environment import RankEnvironment, detect_ranks, first_host, tasks_on_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29511",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# `srun --nodes=3 --ntasks=9` in a job of five nodes.
SRUN = {
    "SLURM_JOB_ID": "901593",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "8",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_STEP_NODELIST": "node[02-04]",
    "SLURM_JOB_NODELIST": "node[01-05]",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "launcher", "rank", "world_size", "local_rank", "local_world_size", "master_addr"),
    [
        pytest.param(TORCHRUN, "torchrun", 5, 8, 1, 4, "10.0.0.7", id="torchrun"),
        pytest.param(
            without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_SIZE": "4"},
            *("torchrun", 5, 8, 1, 4, "10.0.0.7"),
            id="deepspeed",
        ),
        pytest.param(without(TORCHRUN, "LOCAL_WORLD_SIZE"), "torchrun", 5, 8, 1, None, "10.0.0.7", id="set by hand"),
        pytest.param(OPEN_MPI | {"MASTER_ADDR": "head"}, "mpirun", 3, 4, 1, 2, "head", id="mpirun on two machines"),
        pytest.param(
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            *("mpirun", 3, 4, 3, 4, "127.0.0.1"),
            id="mpirun on one machine",
        ),
        pytest.param(
            OPEN_MPI | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a[7-8]"},
            *("mpirun", 3, 4, 1, 2, "a7"),
            id="mpirun in a SLURM batch script",
        ),
        pytest.param(MPICH, "mpiexec", 1, 2, 1, 2, "127.0.0.1", id="mpiexec"),
        pytest.param(
            MPICH | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            *("mpiexec", 1, 2, 1, 2, "127.0.0.1"),
            id="mpiexec whose helpers srun started",
        ),
        pytest.param(SRUN, "srun", 8, 9, 0, 1, "node02", id="srun"),
        pytest.param(SRUN | {"PMI_RANK": "8", "PMI_SIZE": "9"}, "srun", 8, 9, 0, 1, "node02", id="srun with PMI"),
        pytest.param(
            SRUN | {"MASTER_ADDR": "node03", "MASTER_PORT": "1234", "WORLD_SIZE": "9"},
            *("srun", 8, 9, 0, 1, "node03"),
            id="srun with a master of the user's",
        ),
        pytest.param(SRUN | TORCHRUN, "torchrun", 5, 8, 1, 4, "10.0.0.7", id="torchrun under srun, one a node"),
    ],
)
def test_launchers(
    environ: dict[str, str],
    launcher: str,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int | None,
    master_addr: str,
) -> None:
    found = detect_ranks(environ)
    assert found is not None
    port = found.master_port
    assert found == RankEnvironment(launcher, rank, world_size, local_rank, local_world_size, master_addr, port)
    assert port == int(environ["MASTER_PORT"]) if "MASTER_PORT" in environ else 20_000 <= port < 32_000
    # What it writes for torch is what it reads from torchrun.
    again = detect_ranks(found.as_environ())
    assert again is not None
    assert again.as_environ() == found.as_environ()


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"MASTER_ADDR": "node01", "MASTER_PORT": "29500"}, id="only a master"),
        pytest.param(without(SRUN, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"), id="batch script of a SLURM job"),
        pytest.param(without(SRUN, "SLURM_PROCID"), id="no SLURM_PROCID"),
        pytest.param(
            SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
            id="salloc's interactive step",
        ),
        pytest.param({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, id="srun of one task"),
    ],
)
def test_not_a_launch(environ: dict[str, str]) -> None:
    assert detect_ranks(environ) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without(TORCHRUN, "MASTER_PORT"), "not set: MASTER_PORT,"),
        (without(TORCHRUN, "LOCAL_RANK", "WORLD_SIZE"), "not set: WORLD_SIZE, LOCAL_RANK,"),
        (without(TORCHRUN, "RANK", "LOCAL_RANK"), "not set: RANK, LOCAL_RANK,"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"), "not set: OMPI_COMM_WORLD_LOCAL_RANK,"),
        (OPEN_MPI, "type mpirun -x MASTER_ADDR=<host of rank 0>"),
        (without(MPICH, "PMI_SIZE"), "not set: PMI_SIZE,"),
        (without(SRUN, "SLURM_LOCALID"), "not set: SLURM_LOCALID,"),
        (without(SRUN, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), "not set: SLURM_NTASKS,"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "not set: SLURM_JOB_NODELIST,"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 in a world of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' must be a whole number"),
    ],
)
def test_half_set_variables_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        detect_ranks(environ)
    assert message in str(caught.value)


def test_all_ranks_of_a_step_agree_on_the_port_and_two_steps_do_not() -> None:
    ports = [detect_ranks(SRUN | {"SLURM_PROCID": str(rank)}) for rank in range(9)]
    assert len({place.master_port for place in ports if place is not None}) == 1
    other = detect_ranks(SRUN | {"SLURM_STEP_ID": "1"})
    assert other is not None
    assert ports[0] is not None
    assert other.master_port != ports[0].master_port


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[01-04,07]", "node01"),
        ("node[07,01-04],x[1-2]", "node07"),
        ("r[1-2]n[03-09]", "r1n03"),
        ("gpu-a[10-12]-ib.cluster,b", "gpu-a10-ib.cluster"),
        ("nid001096", "nid001096"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_an_empty_node_list_is_refused() -> None:
    with pytest.raises(LaunchError, match="names no host"):
        first_host("")


def test_tasks_on_node() -> None:
    assert [tasks_on_node("2,4(x3),1", node) for node in range(6)] == [2, 4, 4, 4, 1, None]
    assert tasks_on_node("", 0) is None
