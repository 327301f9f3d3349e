"""Optimizer states in files: updates chunk by chunk, against torch's optimizers, and the memory that they need."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipekit.deepspeed import state_files
from pipekit.deepspeed.state_files import StateFiles, take_nvme_path
from pipekit.errors import ConfigError, StorageError

BUILDERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda tensors: torch.optim.AdamW(tensors, lr=0.1),
    "amsgrad": lambda tensors: torch.optim.Adam(tensors, lr=0.1, amsgrad=True),
    "sgd": lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9),
    "rprop": lambda tensors: torch.optim.Rprop(tensors, lr=0.1),
    "nadam": lambda tensors: torch.optim.NAdam(tensors, lr=0.1),
}


def tensors(*sizes: int) -> list[Tensor]:
    found = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    for each in found:
        each.grad = torch.zeros_like(each)
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_updates_chunk_by_chunk_are_those_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(state_files, "_CHUNK", 4096)
    sizes = (10_000, 4096, 7)
    ours, theirs = tensors(*sizes), tensors(*sizes)
    optimizer, expected = BUILDERS[name](ours), BUILDERS[name](theirs)
    StateFiles(tmp_path).hold_states(optimizer, ours)
    for step in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step))
            for each in (mine, other):
                assert each.grad is not None
                each.grad.copy_(gradient)
        optimizer.step()
        expected.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        assert optimizer.state[mine].keys() == expected.state[other].keys()
        for key, state in expected.state[other].items():
            torch.testing.assert_close(torch.as_tensor(optimizer.state[mine][key]), torch.as_tensor(state))


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_states_take_no_anonymous_memory_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "_CHUNK", 2**16)
    size = 2**23
    grown = {}
    for kept in ("memory", "files"):
        (tensor,) = tensors(size)
        optimizer = torch.optim.AdamW([tensor], foreach=False)
        before = anonymous_bytes()
        if kept == "files":
            files = StateFiles(tmp_path)
            files.hold_states(optimizer, [tensor])
            assert files.num_bytes == 4 * 4 * size
        optimizer.step()
        grown[kept] = anonymous_bytes() - before
        assert list(tmp_path.iterdir()) == []
    assert grown["memory"] > 7 * size
    # Into files go the weights and the gradients too.
    assert grown["files"] < size


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_without_room_is_one_error(tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(StorageError, match="larger than the system allows"):
        StateFiles(tmp_path).build(torch.empty(1_000_000, device="meta"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, "set nvme_path to it"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/nvme"}}, "kept in files together"),
    ],
)
def test_sections_that_name_no_folder_or_weights_alone_are_refused(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take_nvme_path({"zero_optimization": zero})
