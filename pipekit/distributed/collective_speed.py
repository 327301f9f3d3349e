"""Speed of messages among the ranks of a run: an all-reduce, and a message of each rank to the next, by size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipekit.distributed.processes import gather_objects

SIZES = (1 << 10, 32 << 10, 1 << 20, 16 << 20)
"""Bytes of the messages."""

_REPEATS = 5
# No larger size is tried once one message takes so long.
_LONG_S = 0.25


def measure_collectives(device: torch.device, *, host: str, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Measure on all ranks, which call this together after they have joined.

    Args:
        device: of this rank.
        host: name of this rank's host.
        sizes: bytes of the messages, multiples of 4, the smallest first.

    Returns:
        What JSON can hold: `backend`, `world_size`, `is_right` (all ranks received the right numbers), the `hosts` of
        the ranks, and `times`: for "all-reduce" and "send", pairs of bytes and the seconds of the slowest rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    operations: dict[str, Callable[[torch.Tensor], bool]] = {"all-reduce": _all_reduce}
    if world_size > 1:
        operations["send"] = _send_to_next
    is_right = True
    times: dict[str, list[tuple[int, float]]] = {}
    for name, operation in operations.items():
        times[name] = []
        for size in sizes:
            sent = torch.empty(size // 4, device=device)
            all_s = []
            for repeat in range(1 + _REPEATS):
                sent.fill_(rank + 1)
                _wait(device)
                start_s = time.perf_counter()
                is_right &= operation(sent)
                _wait(device)
                if repeat:  # the first connects
                    all_s.append(time.perf_counter() - start_s)
            slowest_s = max(gather_objects(min(all_s)))
            times[name].append((size, slowest_s))
            if slowest_s > _LONG_S:
                break
    everyones: list[Any] = gather_objects((is_right, host))
    return {
        "backend": dist.get_backend(),
        "world_size": world_size,
        "is_right": all(right for right, _ in everyones),
        "hosts": [name for _, name in everyones],
        "times": times,
    }


def _all_reduce(tensor: torch.Tensor) -> bool:
    world_size = dist.get_world_size()
    dist.all_reduce(tensor)
    return bool((tensor[[0, -1]] == world_size * (world_size + 1) / 2).all())


def _send_to_next(tensor: torch.Tensor) -> bool:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(tensor)
    before = (rank - 1) % world_size
    messages = [
        dist.P2POp(dist.isend, tensor, (rank + 1) % world_size),
        dist.P2POp(dist.irecv, received, before),
    ]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return bool((received[[0, -1]] == before + 1).all())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
