"""Inputs of recomputed layers, as shards of ranks that are threads and in host memory, against torch's checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensor_parallel.kept_inputs import HostCopy, KeptInput, KeptInputs
from tensor_parallel.threads import run_ranks

WIDTH = 8


class Positioned(nn.Module):
    """Takes and returns a tensor and the positions of its tokens, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        x, (positions,) = given
        return torch.tanh(self.linear(x)) * positions, [positions]


def layers() -> list[nn.Module]:
    torch.manual_seed(1)
    return [Positioned() for _ in range(3)]


def inputs(length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(2, length, WIDTH, requires_grad=True), torch.arange(length).view(1, length, 1)


def gradients(network: list[nn.Module], given: tuple[Tensor, Tensor], run: Any) -> list[Tensor]:
    """Run layers one after the other, and return the gradients of the input and of all weights."""
    x, positions = given
    y: Any = (x, [positions])
    for layer in network:
        y = run(layer, y)
    weights = [weight for layer in network for weight in layer.parameters()]
    return list(torch.autograd.grad(y[0].square().sum(), [x, *weights]))


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
@pytest.mark.parametrize(("size", "length"), [(1, 4), (2, 4), (4, 4), (3, 5)])
def test_gradients_are_those_of_torchs_checkpoints_to_the_bit(size: int, length: int, offload: bool) -> None:
    def by_torch(layer: nn.Module, x: Any) -> Any:
        return checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)

    def rank(group: TensorGroup) -> list[Tensor]:
        keeper = KeptInputs(group if size > 1 else None, offload=offload)
        keeper.begin()

        def run(layer: nn.Module, x: Any) -> Any:
            return keeper.run(layer, x, is_shard=False, is_held=False, preserve_rng_state=False)

        return gradients(own_layers[group.rank], own_inputs[group.rank], run)

    expected = gradients(layers(), inputs(length), by_torch)
    own_layers, own_inputs = [layers() for _ in range(size)], [inputs(length) for _ in range(size)]
    for found in run_ranks(size, rank):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("partition", "offload", "is_shard", "is_held", "kept_bytes", "where"),
    [
        (True, False, False, False, 4 * 2 * 4 * WIDTH // 2, "device"),
        (False, True, False, False, 4 * 2 * 4 * WIDTH, "host"),
        (True, True, False, False, 4 * 2 * 4 * WIDTH // 2, "host"),
        (True, True, True, False, 4 * 2 * 4 * WIDTH, "host"),
        (True, False, True, False, None, "untouched"),
        (True, True, False, True, None, "untouched"),
        (False, False, False, False, None, "untouched"),
    ],
)
def test_a_rank_keeps_its_shard_or_a_copy_in_host_memory(
    monkeypatch: pytest.MonkeyPatch,
    partition: bool,
    offload: bool,
    is_shard: bool,
    is_held: bool,
    kept_bytes: int | None,
    where: str,
) -> None:
    kept: list[Tensor | KeptInput] = []
    pack = KeptInputs._pack

    def noted(self: KeptInputs, *args: Any) -> Tensor | KeptInput:
        kept.append(pack(self, *args))
        return kept[-1]

    monkeypatch.setattr(KeptInputs, "_pack", noted)
    x = torch.randn(2, 4, WIDTH, requires_grad=True)

    def rank(group: TensorGroup) -> None:
        keeper = KeptInputs(group if partition else None, offload=offload)
        y = keeper.run(nn.GELU(), x, is_shard=is_shard, is_held=is_held, preserve_rng_state=False)
        assert y.requires_grad

    run_ranks(2, rank)
    if kept_bytes is None:
        assert kept == []
        return
    assert len(kept) == 2
    for each in kept:
        assert isinstance(each, KeptInput)
        assert isinstance(each.piece, HostCopy) == (where == "host")
        tensor = each.piece.host if isinstance(each.piece, HostCopy) else each.piece
        assert tensor.untyped_storage().nbytes() == kept_bytes
        assert tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
