"""Shards: the slices of a logical tensor that a tensor-parallel rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipekit.errors import LayoutError


@dataclass(frozen=True)
class Shard:
    """One rank's shard of a logical tensor that is split along one dimension.

    Attributes:
        dim: the dimension that is split.
        blocks: lengths of the logical tensor's blocks along `dim`, each of which is split separately: of a joint
            projection to queries, keys and values, every rank gets some of each.
        rank: this rank's index in the tensor group.
        size: the tensor-parallel degree. The shards of a block are as even as possible, the larger ones first.

    Example:
        >>> whole = torch.arange(12)
        >>> shards = [Shard(dim=0, blocks=(8, 4), rank=rank, size=2) for rank in range(2)]
        >>> [shard.take(whole).tolist() for shard in shards]
        [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7, 10, 11]]
        >>> shards[0].join([shard.take(whole) for shard in shards]).tolist() == whole.tolist()
        True
    """

    dim: int
    blocks: tuple[int, ...]
    rank: int
    size: int

    def slices_of(self, rank: int) -> list[slice]:
        """Return the slices of `rank` along `dim`, one for each block."""
        slices, start = [], 0
        for length in self.blocks:
            first, last = shard_bounds(length, rank, self.size)
            slices.append(slice(start + first, start + last))
            start += length
        return slices

    @property
    def slices(self) -> list[slice]:
        """This rank's slices along `dim`, one for each block."""
        return self.slices_of(self.rank)

    def take(self, whole: Tensor) -> Tensor:
        """Return a copy of this rank's shard of a logical tensor."""
        views = [whole.narrow(self.dim, own.start, own.stop - own.start) for own in self.slices]
        return torch.cat(views, self.dim) if len(views) > 1 else views[0].clone()

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Join the shards of all ranks, in rank order, into the logical tensor."""
        whole = shards[0].new_empty(self.whole_shape(shards[0].shape))
        for rank, shard in enumerate(shards):
            start = 0
            for target in self.slices_of(rank):
                length = target.stop - target.start
                whole.narrow(self.dim, target.start, length).copy_(shard.narrow(self.dim, start, length))
                start += length
        return whole

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the logical tensor, given the shape of a shard."""
        return (*shape[: self.dim], sum(self.blocks), *shape[self.dim + 1 :])

    def shape_of(self, rank: int, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a rank's shard, given the shape of another rank's shard."""
        length = sum(own.stop - own.start for own in self.slices_of(rank))
        return (*shape[: self.dim], length, *shape[self.dim + 1 :])


def shard_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """Start and end of a rank's shard of `length` elements; shards are as even as possible, the larger ones first.

    Example:
        >>> [shard_bounds(6, rank, 4) for rank in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 6)]
    """
    even, larger = divmod(length, size)
    return rank * even + min(rank, larger), (rank + 1) * even + min(rank + 1, larger)


def shard_parameter(module: nn.Module, name: str, shard: Shard) -> None:
    """Replace a whole parameter of `module` by this rank's shard; modules that share the parameter share the shard.

    Raises:
        LayoutError: if a rank would get an empty shard, or another module shards the same parameter differently.
    """
    whole = module.get_parameter(name)
    if (other := replacement_of(whole)) is not None:
        if shard_of(other) != shard:
            raise LayoutError(
                f"{type(module).__name__}.{name} is shared with a module that shards it in another way under "
                f"parallel.tp={shard.size}; shard both in the same way, or give them parameters of their own"
            )
        setattr(module, name, other)
        return
    if min(shard.blocks) < shard.size:
        raise LayoutError(
            f"parallel.tp={shard.size} is more than the size of {type(module).__name__}.{name} along dimension "
            f"{shard.dim}, {min(shard.blocks)}; try parallel.tp={min(shard.blocks)} or less"
        )
    with torch.no_grad():
        own = nn.Parameter(shard.take(whole), requires_grad=whole.requires_grad)
    own.tensor_shard = shard  # type: ignore[attr-defined]
    whole.tensor_replacement = own  # type: ignore[attr-defined]
    # DeepSpeed's gradient norm counts parameters with these attributes on every tensor-parallel rank.
    own.tensor_model_parallel = own.model_parallel = True  # type: ignore[attr-defined]
    setattr(module, name, own)


def shard_of(parameter: Tensor) -> Shard | None:
    """Return the `Shard` that a parameter is of its logical tensor; None if the parameter is whole."""
    shard: Shard | None = getattr(parameter, "tensor_shard", None)
    return shard


def replacement_of(whole: Tensor) -> nn.Parameter | None:
    """Return the shard that replaced a whole parameter; None if the parameter was not sharded."""
    own: nn.Parameter | None = getattr(whole, "tensor_replacement", None)
    return own


def mark_partial_gradient(parameter: nn.Parameter) -> None:
    """Mark a parameter as applied only to this rank's shard of the sequence, so its gradient is partial."""
    parameter.has_partial_gradient = True  # type: ignore[attr-defined]


def has_partial_gradient(parameter: Tensor) -> bool:
    """True if the gradient of a whole parameter must still be summed over the tensor group."""
    return getattr(parameter, "has_partial_gradient", False)
