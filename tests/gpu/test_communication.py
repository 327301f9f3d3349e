"""Communication between GPUs: NCCL's groups, the schedules over them, and replicas that share one GPU over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from engine_jobs import GLOBAL_BATCH, Case, assert_trained_as_one_process, show, train
from gpu_workers import GpuWorkers, on_cpu, on_gpus, own_device, workers_on
from pipekit.predictions.devices import gpu_reserve_bytes

pytestmark = pytest.mark.distributed

SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "auto")
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}


def pipeline_job(rank: int, device: str, case: Case, waits_everywhere: bool) -> dict[str, Any]:
    """Train; where asked, wait for the device and give its memory back after every operation of the executor.

    So do the caching allocator where memory is short, and the first use of a kernel.
    """
    from pipekit.engine import executor

    num_waits = 0
    do: Callable[..., Any] = executor._Run.do

    def do_and_wait(*args: Any) -> None:
        nonlocal num_waits
        do(*args)
        num_waits += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    with mock.patch.object(executor._Run, "do", do_and_wait if waits_everywhere else do):
        result = train(rank, case, device=own_device(device))
    assert bool(num_waits) == waits_everywhere
    return result


def cases() -> list[Any]:
    found: list[Any] = []
    for pp in (2, 3, 4):
        for schedule in SCHEDULES:
            if schedule == "interleaved-1f1b" and GLOBAL_BATCH % pp:
                continue
            case = Case(pp=pp, schedule=schedule)
            found.append(on_gpus(pp, "cuda", case, name=f"cuda-{show(case)}"))
    return [on_cpu("cpu", Case(pp=2, schedule="zb-v"), name="cpu-pp=2-schedule=zb-v"), *found]


@pytest.mark.parametrize("waits_everywhere", [False, True], ids=["", "waits everywhere"])
@pytest.mark.parametrize(("device", "case"), cases())
def test_pipelines_train_as_one_process_does(device: str, case: Case, waits_everywhere: bool) -> None:
    results = workers_on(device).run(case.world_size, pipeline_job, device, case, waits_everywhere)
    assert_trained_as_one_process(results, case, TOLERANCE[device])


REPLICAS = [
    Case(dp=2),
    Case(dp=2, zero=0),
    Case(dp=2, zero=2),
    Case(dp=2, zero=3),
    Case(tp=2, sequence_parallel=True),
    Case(tp=2, sequence_parallel=False),
]


@pytest.mark.parametrize(
    ("device", "case"),
    [on_gpus(2, "cuda", case, name=show(case)) for case in REPLICAS] + [on_cpu("cpu", REPLICAS[-1], name="cpu")],
)
def test_replicas_and_shards_train_as_one_process_does(device: str, case: Case) -> None:
    results = workers_on(device).run(2, pipeline_job, device, case, False)
    assert_trained_as_one_process(results, case, TOLERANCE[device])


def shared_gpu_job(rank: int, case: Case) -> dict[str, Any]:
    torch.cuda.set_device(0)
    # DeepSpeed's engine would take the local rank for the number of a GPU.
    with mock.patch.dict("os.environ", LOCAL_RANK="0"):
        return train(rank, case, device=torch.device("cuda", 0))


# Gloo sends tensors of a GPU in collectives alone, so that there is no pipeline.
@pytest.mark.parametrize("case", [on_gpus(1, case, name=show(case)) for case in REPLICAS])
def test_two_ranks_on_one_gpu_train_as_one_process_does(case: Case) -> None:
    assert_trained_as_one_process(GpuWorkers("gloo").run(2, shared_gpu_job, case), case, TOLERANCE["cuda"])


def nccl_job(rank: int) -> dict[str, Any]:
    """Watch NCCL do what the engine relies on, with a bound device and one rank."""
    import torch.distributed as dist

    # Ranks join as pipekit has them, which binds no device where there is one rank.
    dist.destroy_process_group()
    device = own_device("cuda")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    tensor = torch.ones(1 << 20, device=device)
    dist.all_reduce(tensor)
    torch.cuda.synchronize()
    free_before, total = torch.cuda.mem_get_info()
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = 4
    groups = [dist.new_group([0], pg_options=options) for _ in range(4)]
    for group in groups:
        dist.all_reduce(tensor, group=group)
    torch.cuda.synchronize()
    free_after, _ = torch.cuda.mem_get_info()

    # A collective behind a kernel that lasts: waiting for it is the stream's, not the host's.
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
    work = dist.all_reduce(tensor, group=groups[0], async_op=True)
    assert work is not None
    work.wait()
    was_completed = work.is_completed()
    torch.cuda.synchronize()
    return {
        "was_completed": was_completed,
        "is_completed": work.is_completed(),
        "bytes_of_four_groups": free_before - free_after,
        "reserve_bytes": gpu_reserve_bytes(total),
        "sum": float(tensor.sum()),
    }


@pytest.mark.parametrize("world_size", [on_gpus(1, 1)])
def test_nccl_waits_on_the_stream_and_tells_when_work_is_done(world_size: int) -> None:
    (seen,) = GpuWorkers().run(world_size, nccl_job)
    assert not seen["was_completed"]
    assert seen["is_completed"]
    assert seen["sum"] == float(1 << 20)
    assert seen["bytes_of_four_groups"] <= seen["reserve_bytes"]
