"""The GPU of a ported script's process, with torch's functions replaced: no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deepspeed
from pipekit.deepspeed import patches
from pipekit.deepspeed.deepspeed_config import plan_deepspeed_config


@pytest.mark.parametrize(
    ("is_joined", "current", "num_visible", "expected"),
    [
        (True, 0, 8, ["bind 3"]),  # the script joined, and chose no GPU
        (False, 0, 8, ["bind 3", "deepspeed"]),
        (True, 3, 8, []),  # the script chose its own
        (True, 5, 8, []),
        (False, 0, 1, ["join 3", "deepspeed"]),  # one GPU is visible to each process
        (True, 0, 1, ["bind 3"]),
    ],
)
def test_a_ported_script_has_its_gpu_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, is_joined: bool, current: int, num_visible: int, expected: list[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(patches, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(patches, "bind_gpu", lambda local_rank: calls.append(f"bind {local_rank}"))
    monkeypatch.setattr(patches, "join_processes", lambda *, local_rank, **_: calls.append(f"join {local_rank}"))
    monkeypatch.setattr(patches.dist, "is_initialized", lambda: is_joined)
    monkeypatch.setattr(deepspeed.comm, "is_initialized", lambda: is_joined)
    # DeepSpeed itself tells the local rank only when it has joined.
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: calls.append("deepspeed"))
    patches.use_joined_processes()
    assert calls == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_host_memory_of_offloaded_tensors_is_pinned_for_gpus_alone(device: Any) -> None:
    zero = plan_deepspeed_config(
        micro_batch_size=1,
        num_micro_batches=1,
        precision="bf16",
        zero=3,
        gradient_clipping=1.0,
        extra={},
        offload="parameters",
        device=device,
    )["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        assert zero[key] == {"device": "cpu", "pin_memory": device == "cuda"}
