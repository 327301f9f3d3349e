"""The GPU of a process, with torch's functions replaced: no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipekit.distributed import processes
from pipekit.distributed.processes import bind_gpu, join_processes
from pipekit.errors import LaunchError


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that were made the current one."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    return devices


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("local_rank", "num_visible", "index"), [(3, 8, 3), (3, 1, 0), (5, 4, 1)])
def test_a_local_rank_takes_its_gpu_among_those_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, bound: list[torch.device], local_rank: int, num_visible: int, index: int
) -> None:
    see_gpus(monkeypatch, num_visible)
    assert bind_gpu(local_rank) == torch.device("cuda", index)
    assert bound == [torch.device("cuda", index)]


def test_a_process_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, bound: list[torch.device]) -> None:
    see_gpus(monkeypatch, 0)
    with pytest.raises(LaunchError, match=r"local rank 1 sees no GPU.*HIP_VISIBLE_DEVICES.*run\.device=cpu"):
        join_processes(device="cuda", timeout_s=1.0, local_rank=1)


def test_nccl_is_given_the_gpu_that_was_bound(monkeypatch: pytest.MonkeyPatch, bound: list[torch.device]) -> None:
    see_gpus(monkeypatch, 1)
    given: dict[str, Any] = {}

    def init(backend: str, **kwargs: Any) -> None:
        given.update(kwargs, backend=backend)

    monkeypatch.setattr(processes.dist, "rendezvous", lambda *args, **kwargs: iter([(None, 3, 4)]))
    monkeypatch.setattr(processes.dist, "PrefixStore", lambda name, store: store)
    monkeypatch.setattr(processes.dist, "init_process_group", init)
    assert join_processes(device="cuda", timeout_s=1.0, local_rank=3) == torch.device("cuda", 0)
    assert (given["backend"], given["device_id"], given["rank"]) == ("nccl", torch.device("cuda", 0), 3)
