"""Consistency check: ranks that hold the same tensor hold the same bits, by checksums compared across the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import gather_objects
from pipekit.engine.logical_model import LogicalModel
from pipekit.errors import ReplicaError
from pipekit.layout import Axis, Coordinate
from pipekit.tensor_parallel import Shard, shard_of

# Elements that are summed at a time: as 64-bit integers they and their positions take 32 MiB each.
_CHUNK_ELEMENTS = 1 << 22

# An error that goes on for pages is not read.
_MOST_SHOWN = 6
_MOST_RANKS_SHOWN = 8

_COPIES_ALONG: dict[Axis, str] = {
    "data": "data-parallel replicas",
    "tensor": "tensor-parallel ranks, which hold it whole",
    "pipe": "copies of a tied layer on pipeline ranks",
}


@dataclass(frozen=True)
class TensorDigest:
    """Checksum and place of one tensor.

    Attributes:
        dtype: its number format.
        shape: shape of the part that the rank holds.
        sums: two sums of its bits; see `sum_bits`.
    """

    dtype: str
    shape: tuple[int, ...]
    sums: tuple[int, int]


TensorPart = tuple[str, Shard | None]
"""A tensor's logical name, and the part of it that a tensor-parallel rank holds; None is the whole. Ranks that hold the
same part must hold the same bits."""


@dataclass(frozen=True)
class RankDescription:
    """Checksums of the tensors of a rank, as plain data.

    Attributes:
        rank: the global rank.
        coordinate: its place in the layout.
        data_ranks: the ranks of its data-parallel group.
        tensors: the digest of each tensor that has copies.
    """

    rank: int
    coordinate: Coordinate
    data_ranks: tuple[int, ...]
    tensors: Mapping[TensorPart, TensorDigest]


def sum_bits(tensor: Tensor) -> Tensor:
    """Return two sums over the bits of a tensor, each modulo 2^64, on its device: plain, and weighted by position.

    Elements count as integers, those of 8 bytes and more as several. So NaN is equal to the same NaN, and 0.0 is not
    -0.0. The first sum changes with any single element; the second also where two elements have changed places. The
    order of additions does not matter, so that every device and number of threads gives the same.

    Args:
        tensor: of any shape and number format. It is read in pieces, which take 64 MiB at the most; one that is not
            contiguous is copied first.

    Returns:
        Integers of shape `(2,)`.

    Example:
        >>> sum_bits(torch.tensor([3, 5], dtype=torch.int32)).tolist()
        [8, 13]
        >>> sum_bits(torch.tensor([5, 3], dtype=torch.int32)).tolist()
        [8, 11]
        >>> sum_bits(torch.tensor([0.0])).tolist() == sum_bits(torch.tensor([-0.0])).tolist()
        False
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    positions = torch.arange(1, min(_CHUNK_ELEMENTS, bits.numel()) + 1, device=bits.device)
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK_ELEMENTS):
        chunk = bits[start : start + _CHUNK_ELEMENTS].to(torch.int64)
        plain = chunk.sum()
        weighted = chunk.mul_(positions[: chunk.numel()]).sum() + start * plain
        sums += torch.stack([plain, weighted])
    return sums


def digest_tensors(model: LogicalModel) -> dict[TensorPart, TensorDigest]:
    """Return the digest of each parameter and persistent buffer of this rank that other ranks may hold as well.

    Parameters that ZeRO-3 has cut into pieces are left out: every piece is on one rank alone.
    """
    tensors: dict[TensorPart, Tensor] = {}
    for name, parameter, _ in model.named_logical_parameters():
        if not hasattr(parameter, "ds_shape"):
            tensors[name, shard_of(parameter)] = parameter
    for name, buffer, _ in model.named_logical_buffers():
        tensors[name, shard_of(buffer)] = buffer
    if not tensors:
        return {}
    sums = [sum_bits(tensor) for tensor in tensors.values()]
    # One transfer for all of them; each would wait for the device.
    totals = torch.stack([pair.to(sums[0].device) for pair in sums]).tolist()
    return {
        part: TensorDigest(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), (plain, weighted))
        for (part, tensor), (plain, weighted) in zip(tensors.items(), totals, strict=True)
    }


def find_differing_copies(descriptions: Sequence[RankDescription]) -> list[str]:
    """Tensors whose copies are not all equal: a line for each, with its name and the ranks that differ.

    The copy that most ranks hold counts as right; of several that equally many hold, that of the lowest rank.

    Args:
        descriptions: of every rank, in rank order.

    Example:
        >>> descriptions = []
        >>> for rank, value in enumerate([1.0, 1.0, 5.0]):
        ...     sums = tuple(sum_bits(torch.tensor([value])).tolist())
        ...     tensors = {("norm.bias", None): TensorDigest("float32", (1,), sums)}
        ...     coordinate = Coordinate(pipe=0, data=rank, tensor=0)
        ...     descriptions.append(RankDescription(rank, coordinate, (0, 1, 2), tensors))
        >>> find_differing_copies(descriptions)
        ['norm.bias: rank 2 differs from ranks 0, 1 (data-parallel replicas)']
    """
    holders: dict[TensorPart, dict[int, TensorDigest]] = {}
    for description in descriptions:
        for part, digest in description.tensors.items():
            holders.setdefault(part, {})[description.rank] = digest
    return [fault for (name, _), digests in holders.items() for fault in _faults_of_part(name, digests, descriptions)]


def _faults_of_part(
    name: str, digests: Mapping[int, TensorDigest], descriptions: Sequence[RankDescription]
) -> Iterator[str]:
    expected = {peer for rank in digests for peer in descriptions[rank].data_ranks}
    missing, present = sorted(expected - set(digests)), sorted(digests)
    if missing:
        yield f"{name}: {_show(missing)} {_verb(missing, 'lack')} it, and {_show(present)} {_verb(present, 'hold')} it"
    ranks_of: dict[TensorDigest, list[int]] = {}
    for rank, digest in digests.items():
        ranks_of.setdefault(digest, []).append(rank)
    if len(ranks_of) == 1:
        return
    right = max(ranks_of, key=lambda digest: (len(ranks_of[digest]), -ranks_of[digest][0]))
    for digest, ranks in ranks_of.items():
        if digest != right and replace(digest, sums=right.sums) != right:
            yield (
                f"{name}: {digest.dtype} {digest.shape} on {_show(ranks)}, and {right.dtype} {right.shape} on "
                f"{_show(ranks_of[right])}"
            )
    others = {digest: ranks for digest, ranks in ranks_of.items() if replace(digest, sums=right.sums) == right}
    del others[right]
    differing = sorted(rank for ranks in others.values() for rank in ranks)
    if differing:
        among = ", and among themselves" if len(others) > 1 else ""
        axes = [text for axis, text in _COPIES_ALONG.items() if _differs_along(axis, digests, descriptions)]
        where = f" ({', '.join(axes)})" if axes else ""
        yield f"{name}: {_show(differing)} {_verb(differing, 'differ')} from {_show(ranks_of[right])}{among}{where}"


def _differs_along(axis: Axis, digests: Mapping[int, TensorDigest], descriptions: Sequence[RankDescription]) -> bool:
    """True if two ranks that differ along `axis` alone hold different bits."""
    seen: dict[Coordinate, TensorDigest] = {}
    for rank, digest in digests.items():
        coordinate = descriptions[rank].coordinate
        line = Coordinate(**{**vars(coordinate), axis: 0})
        if seen.setdefault(line, digest) != digest:
            return True
    return False


def _show(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:_MOST_RANKS_SHOWN]))
    more = len(ranks) - _MOST_RANKS_SHOWN
    return f"ranks {shown}" + (f" and {more} more" if more > 0 else "")


def _verb(ranks: Sequence[int], verb: str) -> str:
    return f"{verb}s" if len(ranks) == 1 else verb


def check_consistency(model: LogicalModel, mpu: ModelParallelUnit, *, step: int) -> None:
    """Check that all ranks that hold the same tensor hold the same bits of it. Every rank calls this at the same place.

    Parameters and persistent buffers are compared among data-parallel replicas, among tensor-parallel ranks that hold a
    tensor whole, and among pipeline ranks that share a tied layer. A checkpoint keeps one copy of each.
    Parameters under ZeRO-3 are left out, since each rank holds a piece that no other has. Optimizer states and fp32
    masters are left out too: where they have copies, what differs in them shows in the weights after the next update.

    It costs a few passes over the weights on their device, about 50 bytes of memory traffic for each number, 64 MiB of
    memory, one wait for the device, and one collective over all ranks, of about 100 bytes for each tensor of each rank.
    A CPU core takes about 1 s for 10^8 numbers.

    Args:
        model: what this rank holds.
        mpu: the process groups.
        step: number of updates that have been made, for the error.

    Raises:
        ReplicaError: on every rank, with the tensors that differ and the ranks on which they do.
    """
    if mpu.layout.world_size == 1:
        return
    mine = RankDescription(mpu.global_rank, mpu.coordinate, tuple(mpu.data.ranks), digest_tensors(model))
    faults = find_differing_copies(gather_objects(mine))
    if not faults:
        return
    shown = faults[:_MOST_SHOWN]
    if len(faults) > len(shown):
        shown.append(f"and {len(faults) - len(shown)} more")
    lines = "\n  ".join(shown)
    raise ReplicaError(
        f"after step {step}, copies that must be equal on all ranks that hold them are not:\n  {lines}\n"
        "Usually a collective is missing (a gradient that is not summed over these ranks), a seed depends on the rank, "
        "an update is made on some ranks only, or a buffer follows from each rank's own samples, as the statistics of "
        "a BatchNorm do. Run `pipekit verify` to find the layer that computes otherwise than in one process, and go on "
        "from a checkpoint from before the copies differed, with checkpoint.resume=<its folder>"
    )
