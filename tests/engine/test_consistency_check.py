"""Copies of a tensor that must stay equal: their checksums, what differs, and who is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine_jobs import Case, build_engine, micro_batches, model_specs
from gloo_workers import GlooWorkers
from pipekit.distributed.processes import gather_objects
from pipekit.engine import consistency_check
from pipekit.engine.consistency_check import RankDescription, TensorDigest, find_differing_copies, sum_bits
from pipekit.errors import ReplicaError
from pipekit.layers.specs import LayerSpec
from pipekit.layout import Layout
from pipekit.tensor_parallel import Shard, shard_of


def sums(tensor: Tensor) -> list[int]:
    return sum_bits(tensor).tolist()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64,
          torch.int64, torch.int32, torch.uint8]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_element_counts(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 13).reshape(3, 4).to(dtype)
    right = sums(tensor)
    as_bytes = tensor.view(-1).view(torch.uint8)
    for index in range(len(as_bytes)):
        for bit in range(8):
            as_bytes[index] ^= 1 << bit
            assert sums(tensor)[0] != right[0]
            as_bytes[index] ^= 1 << bit
    assert sums(tensor) == right


def test_booleans_scalars_and_empty_tensors() -> None:
    assert sums(torch.tensor([True, False])) != sums(torch.tensor([False, True]))
    assert sums(torch.tensor(3.0)) == sums(torch.tensor([3.0])) != sums(torch.tensor(4.0))
    assert sums(torch.zeros(0, 4)) == [0, 0]


def test_elements_that_have_changed_places_are_seen() -> None:
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    swapped = tensor.clone()
    swapped[0, 1], swapped[6, 4] = tensor[6, 4].clone(), tensor[0, 1].clone()
    assert sums(swapped)[0] == sums(tensor)[0]
    assert sums(swapped)[1] != sums(tensor)[1]


def test_numbers_are_compared_by_their_bits() -> None:
    nan, other_nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert math.isnan(nan)
    assert math.isnan(other_nan)
    assert sums(nan) == sums(nan.clone()) != sums(other_nan)
    assert sums(torch.tensor(0.0)) != sums(torch.tensor(-0.0))


def test_where_pieces_end_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole, turned = sums(tensor), sums(tensor.view(10, 100).T)
    assert turned == sums(tensor.view(10, 100).T.contiguous()) != whole
    for length in (1, 7, 500, 999, 1000, 1001):
        monkeypatch.setattr(consistency_check, "_CHUNK_ELEMENTS", length)
        assert sums(tensor) == whole


RIGHT = TensorDigest("float32", (4,), (10, 30))
WRONG = replace(RIGHT, sums=(11, 31))
WORSE = replace(RIGHT, sums=(12, 32))
WEIGHT = ("norm.weight", None)


def describe(layout: Layout, tensors: Mapping[int, Mapping[Any, TensorDigest]]) -> list[RankDescription]:
    groups = {rank: tuple(ranks) for ranks in layout.groups("data") for rank in ranks}
    return [
        RankDescription(rank, layout.coordinate(rank), groups[rank], tensors.get(rank, {}))
        for rank in range(layout.world_size)
    ]


def faults(layout: Layout, digests: Mapping[int, TensorDigest]) -> list[str]:
    return find_differing_copies(describe(layout, {rank: {WEIGHT: digest} for rank, digest in digests.items()}))


def test_equal_copies_have_no_faults() -> None:
    for layout in (Layout(dp=4), Layout(tp=4), Layout(pp=4), Layout(dp=2, tp=2)):
        assert faults(layout, dict.fromkeys(range(4), RIGHT)) == []


def test_what_most_hold_is_right_and_of_as_many_the_lowest_rank() -> None:
    assert faults(Layout(dp=3), {0: WRONG, 1: RIGHT, 2: RIGHT}) == [
        "norm.weight: rank 0 differs from ranks 1, 2 (data-parallel replicas)"
    ]
    assert faults(Layout(dp=2), {0: RIGHT, 1: WRONG}) == [
        "norm.weight: rank 1 differs from rank 0 (data-parallel replicas)"
    ]
    assert faults(Layout(dp=4), {0: WRONG, 1: RIGHT, 2: WRONG, 3: RIGHT}) == [
        "norm.weight: ranks 1, 3 differ from ranks 0, 2 (data-parallel replicas)"
    ]
    assert faults(Layout(dp=3), {0: RIGHT, 1: WRONG, 2: WORSE}) == [
        "norm.weight: ranks 1, 2 differ from rank 0, and among themselves (data-parallel replicas)"
    ]


def test_it_says_along_which_axis_copies_differ() -> None:
    whole, tied = "(tensor-parallel ranks, which hold it whole)", "(copies of a tied layer on pipeline ranks)"
    assert faults(Layout(tp=2), {0: RIGHT, 1: WRONG}) == [f"norm.weight: rank 1 differs from rank 0 {whole}"]
    assert faults(Layout(pp=3), {0: RIGHT, 2: WRONG}) == [f"norm.weight: rank 2 differs from rank 0 {tied}"]
    # Tensor-parallel ranks 0 and 1 against 2 and 3 of the other replica: along data alone.
    assert faults(Layout(dp=2, tp=2), {0: RIGHT, 1: RIGHT, 2: WRONG, 3: WRONG}) == [
        "norm.weight: ranks 2, 3 differ from ranks 0, 1 (data-parallel replicas)"
    ]
    assert faults(Layout(dp=2, tp=2), {0: RIGHT, 1: RIGHT, 2: RIGHT, 3: WRONG}) == [
        "norm.weight: rank 3 differs from ranks 0, 1, 2 "
        "(data-parallel replicas, tensor-parallel ranks, which hold it whole)"
    ]


def test_parts_are_compared_with_the_same_part_alone() -> None:
    first, second = (Shard(dim=0, blocks=(8,), rank=rank, size=2) for rank in range(2))
    held = {rank: {("w", (first, second)[rank % 2]): (RIGHT, WRONG)[rank % 2]} for rank in range(4)}
    assert find_differing_copies(describe(Layout(dp=2, tp=2), held)) == []
    held[3] = {("w", second): WORSE}
    assert find_differing_copies(describe(Layout(dp=2, tp=2), held)) == [
        "w: rank 3 differs from rank 1 (data-parallel replicas)"
    ]


def test_a_tensor_that_a_replica_lacks_or_holds_in_another_form() -> None:
    assert faults(Layout(dp=3), {0: RIGHT, 2: RIGHT}) == ["norm.weight: rank 1 lacks it, and ranks 0, 2 hold it"]
    other = TensorDigest("bfloat16", (4,), RIGHT.sums)
    assert faults(Layout(dp=3), {0: RIGHT, 1: other, 2: RIGHT}) == [
        "norm.weight: bfloat16 (4,) on rank 1, and float32 (4,) on ranks 0, 2"
    ]
    # Other stages hold other tensors.
    assert faults(Layout(pp=2, dp=2), {2: RIGHT, 3: RIGHT}) == []


def test_of_many_ranks_some_are_named() -> None:
    digests = {rank: WRONG if rank % 4 == 3 else RIGHT for rank in range(64)}
    assert faults(Layout(dp=64), digests) == [
        "norm.weight: ranks 3, 7, 11, 15, 19, 23, 27, 31 and 8 more differ from ranks 0, 1, 2, 4, 5, 6, 8, 9 and 40 "
        "more (data-parallel replicas)"
    ]


def flip_a_bit(tensor: Tensor) -> None:
    as_bytes = tensor.detach().view(-1).view(torch.uint8)
    as_bytes[len(as_bytes) // 2] ^= 1


def change_on_one_rank(rank: int, case: Case, name: str, changed: int) -> str:
    """Return the error after one bit of one tensor has been changed on one rank, behind two steps without faults."""
    engine = build_engine(case)
    for step in range(2):
        engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank))
        engine.check_replicas()
    if rank == changed:
        flip_a_bit({logical: parameter for logical, parameter, _ in engine.module.named_logical_parameters()}[name])
    try:
        engine.check_replicas()
    except ReplicaError as error:
        return str(error)
    return "no error"


NORM, CUT, TIED = "blocks.0.attention.norm.weight", "blocks.0.attention.qkv.weight", "embed.weight"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "name", "changed", "line"),
    [
        (Case(dp=2, zero=0), CUT, 1, f"{CUT}: rank 1 differs from rank 0 (data-parallel replicas)"),
        (Case(dp=2, zero=2), CUT, 0, f"{CUT}: rank 1 differs from rank 0 (data-parallel replicas)"),
        (Case(dp=2, precision="bf16"), NORM, 1, f"{NORM}: rank 1 differs from rank 0 (data-parallel replicas)"),
        (Case(tp=2), NORM, 1, f"{NORM}: rank 1 differs from rank 0 (tensor-parallel ranks, which hold it whole)"),
        (Case(dp=2, tp=2), CUT, 3, f"{CUT}: rank 3 differs from rank 1 (data-parallel replicas)"),
        (Case(pp=2), TIED, 1, f"{TIED}: rank 1 differs from rank 0 (copies of a tied layer on pipeline ranks)"),
        (
            Case(pp=2, tp=2, precision="bf16"),
            TIED,
            3,
            f"{TIED}: rank 3 differs from rank 1 (copies of a tied layer on pipeline ranks)",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)
def test_one_bit_on_one_rank_stops_every_rank(
    gloo: GlooWorkers, case: Case, name: str, changed: int, line: str
) -> None:
    messages = gloo.run(case.world_size, change_on_one_rank, case, name, changed)
    assert len(set(messages)) == 1
    head, *lines = messages[0].splitlines()
    assert head == "after step 2, copies that must be equal on all ranks that hold them are not:"
    assert lines[0] == f"  {line}"
    assert "pipekit verify" in lines[1]


def no_error_without_copies(rank: int) -> str:
    # The shard of another tensor-parallel rank is another tensor, and no copy.
    return change_on_one_rank(rank, Case(tp=2), CUT, 1)


@pytest.mark.distributed
def test_what_has_no_copies_may_be_anything(gloo: GlooWorkers) -> None:
    assert gloo.run(2, no_error_without_copies) == ["no error", "no error"]


def change_everything(rank: int) -> str:
    engine = build_engine(Case(dp=2))
    if rank == 1:
        for parameter in engine.module.parameters():
            flip_a_bit(parameter)
    with pytest.raises(ReplicaError) as caught:
        engine.check_replicas()
    return str(caught.value)


@pytest.mark.distributed
def test_an_error_has_an_end(gloo: GlooWorkers) -> None:
    lines = gloo.run(2, change_everything)[1].splitlines()
    assert len(lines) == 1 + 6 + 1 + 1
    assert lines[7].startswith("  and ")


class RunningMean(nn.Module):
    """Keeps a mean of what it is given, as a BatchNorm does, and how often it was called."""

    def __init__(self, agrees: bool) -> None:
        super().__init__()
        self.agrees = agrees
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean()
        if self.agrees:
            dist.all_reduce(mean)
        self.mean.lerp_(mean, 0.1)
        self.calls += 1
        return x


def train_with_buffers(rank: int, agrees: bool) -> str:
    case = Case(dp=2)
    specs = model_specs(case)
    engine = build_engine(case, specs=[*specs[:2], LayerSpec(RunningMean, agrees), *specs[2:]])
    engine.train_batch(micro_batches(0, case, rank))
    try:
        engine.check_replicas()
    except ReplicaError as error:
        return str(error)
    return "no error"


@pytest.mark.distributed
def test_buffers_are_compared(gloo: GlooWorkers) -> None:
    assert gloo.run(2, train_with_buffers, True) == ["no error"] * 2
    for message in gloo.run(2, train_with_buffers, False):
        lines = message.splitlines()
        assert lines[1].endswith(".mean: rank 1 differs from rank 0 (data-parallel replicas)")
        assert len(lines) == 3
        assert "BatchNorm" in lines[2]


def digested(rank: int, case: Case) -> tuple[set[Any], set[str], set[str]]:
    engine = build_engine(case)
    digests = consistency_check.digest_tensors(engine.module)
    parameters = list(engine.module.named_logical_parameters())
    cut = {name for name, parameter, _ in parameters if shard_of(parameter) is not None}
    return set(digests), {name for name, _, _ in parameters}, cut


@pytest.mark.distributed
def test_every_parameter_is_compared_but_the_pieces_of_zero_3(gloo: GlooWorkers) -> None:
    for parts, names, cut in gloo.run(2, digested, Case(tp=2)):
        assert {name for name, _ in parts} == names
        assert {name for name, shard in parts if shard is not None} == cut
        assert 0 < len(cut) < len(names)
    for parts, names, _ in gloo.run(2, digested, Case(dp=2, zero=3)):
        assert parts == set()
        assert names


def check_with_nans(rank: int, case: Case) -> int:
    """Number of times that ranks meet in a check that finds the same NaN in a weight of every rank."""
    engine = build_engine(case)
    for _, parameter, _ in engine.module.named_logical_parameters():
        parameter.detach().view(-1)[0] = float("nan")
    with mock.patch.object(consistency_check, "gather_objects", wraps=gather_objects) as gather:
        engine.check_replicas()
    return gather.call_count


@pytest.mark.distributed
@pytest.mark.parametrize("case", [Case(), Case(dp=2, tp=2), Case(pp=2, dp=2)], ids=str)
def test_one_collective_and_equal_nans_are_equal(gloo: GlooWorkers, case: Case) -> None:
    assert gloo.run(case.world_size, check_with_nans, case) == [int(case.world_size > 1)] * case.world_size
