"""Random numbers under tensor parallelism: the same on all tensor ranks, except for dropout of a rank's own shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from pipekit.rng import fold_seed
from pipekit.tensor_parallel.group import TensorGroup


@contextmanager
def sharded_randomness(group: TensorGroup | None) -> Iterator[None]:
    """Context manager in which each tensor rank draws different random numbers; afterwards generators are equal again.

    The seed is drawn from the CPU's generator, which has the same state on all tensor ranks. Without a group nothing
    changes.
    """
    if group is None:
        yield
        return
    drawn = int(torch.randint(2**62, (), generator=torch.default_generator, device="cpu"))
    seed = fold_seed(drawn, "tensor", group.rank)
    cpu = torch.default_generator.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        # Not torch.manual_seed, which would also note the call for every GPU that is not in use yet.
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            torch.cuda.manual_seed(seed)
        yield
    finally:
        torch.default_generator.set_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def sharded_dropout(x: Tensor, p: float, training: bool, group: TensorGroup | None) -> Tensor:
    """Apply dropout of probability `p` to this rank's shard `x` of an activation, with a separate mask on each rank."""
    if not training or p == 0:
        return x
    with sharded_randomness(group):
        return F.dropout(x, p)
