"""Which part of a logical tensor a tensor-parallel rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipekit.errors import LayoutError


@dataclass(frozen=True)
class Shard:
    """One rank's part of a logical tensor that is cut along one dimension.

    Attributes:
        dim: the dimension that is cut.
        blocks: lengths of the blocks that the logical tensor consists of along `dim`, each of which is cut by itself:
            of a joint projection to queries, keys and values every rank gets some of each.
        rank: this rank's index in the tensor group.
        size: the tensor-parallel degree. The parts of a block are as even as can be, the larger ones first.

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
        """Return what `rank` holds along `dim`: a slice of each block."""
        slices, start = [], 0
        for length in self.blocks:
            first, last = shard_bounds(length, rank, self.size)
            slices.append(slice(start + first, start + last))
            start += length
        return slices

    @property
    def slices(self) -> list[slice]:
        """What this rank holds along `dim`."""
        return self.slices_of(self.rank)

    def take(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a logical tensor, as a tensor of its own."""
        parts = [whole.narrow(self.dim, part.start, part.stop - part.start) for part in self.slices]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the logical tensor of the parts that the ranks hold, in their order."""
        whole = parts[0].new_empty(self.whole_shape(parts[0].shape))
        for rank, part in enumerate(parts):
            start = 0
            for target in self.slices_of(rank):
                length = target.stop - target.start
                whole.narrow(self.dim, target.start, length).copy_(part.narrow(self.dim, start, length))
                start += length
        return whole

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the logical tensor, given that of this rank's part."""
        return (*shape[: self.dim], sum(self.blocks), *shape[self.dim + 1 :])

    def shape_of(self, rank: int, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a rank's part, given that of another's."""
        length = sum(part.stop - part.start for part in self.slices_of(rank))
        return (*shape[: self.dim], length, *shape[self.dim + 1 :])


def shard_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """Return where a rank's part of `length` elements begins and ends: as even as can be, the larger parts first.

    Example:
        >>> [shard_bounds(6, rank, 4) for rank in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 6)]
    """
    even, larger = divmod(length, size)
    return rank * even + min(rank, larger), (rank + 1) * even + min(rank + 1, larger)


def shard_parameter(module: nn.Module, name: str, shard: Shard) -> None:
    """Replace a whole parameter of `module` by this rank's part of it; modules that share it share the part.

    Raises:
        LayoutError: if a rank would get nothing of it, or another module that shares it is cut in another way.
    """
    whole = module.get_parameter(name)
    if (other := replacement_of(whole)) is not None:
        if shard_of(other) != shard:
            raise LayoutError(
                f"{type(module).__name__}.{name} is shared with a module that is cut in another way under "
                f"parallel.tp={shard.size}; give both the same kind of cut, or parameters of their own"
            )
        setattr(module, name, other)
        return
    if min(shard.blocks) < shard.size:
        raise LayoutError(
            f"parallel.tp={shard.size} is more than {type(module).__name__}.{name} has to share out along dimension "
            f"{shard.dim} ({min(shard.blocks)}); try parallel.tp={min(shard.blocks)} or less"
        )
    with torch.no_grad():
        part = nn.Parameter(shard.take(whole), requires_grad=whole.requires_grad)
    part.tensor_shard = shard  # type: ignore[attr-defined]
    whole.tensor_replacement = part  # type: ignore[attr-defined]
    # By these names DeepSpeed knows that the gradient norm counts it on every tensor-parallel rank.
    part.tensor_model_parallel = part.model_parallel = True  # type: ignore[attr-defined]
    setattr(module, name, part)


def shard_of(parameter: Tensor) -> Shard | None:
    """Return which part of its logical tensor a parameter is; None where it is whole."""
    shard: Shard | None = getattr(parameter, "tensor_shard", None)
    return shard


def replacement_of(whole: Tensor) -> nn.Parameter | None:
    """Return the part that a whole parameter has been replaced by; None if it has not been cut."""
    part: nn.Parameter | None = getattr(whole, "tensor_replacement", None)
    return part


def mark_partial_gradient(parameter: nn.Parameter) -> None:
    """Note that a parameter is applied to this rank's part of the sequence only."""
    parameter.has_partial_gradient = True  # type: ignore[attr-defined]


def has_partial_gradient(parameter: Tensor) -> bool:
    """Return whether the gradient of a whole parameter is yet to be summed over the tensor group."""
    return getattr(parameter, "has_partial_gradient", False)
