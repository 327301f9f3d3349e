"""Activations between layers that take the whole sequence and layers that take a part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekit.errors import LayoutError, PipekitError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, flow_of_spec
from pipekit.tensor_parallel import SHARDED, WHOLE, PlannedGroup, SequenceFlow, TensorGroup
from pipekit.tensor_parallel.flow import convert, flow_of
from tensor_parallel.threads import run_ranks

B, S, D = 2, 6, 3


class Part(nn.Identity):
    sequence_flow = SHARDED


def head(module: nn.Module, x: Tensor) -> Tensor:
    return x


head.sequence_flow = SequenceFlow(takes_shard=True)  # type: ignore[attr-defined]


def test_a_layer_that_says_nothing_takes_and_gives_the_whole_sequence() -> None:
    assert flow_of(nn.Identity()) == flow_of(len) == WHOLE == SequenceFlow(takes_shard=False, returns_shard=False)
    assert flow_of(Part()) == SHARDED == SequenceFlow(takes_shard=True, returns_shard=True)


def test_a_spec_tells_what_its_layer_would() -> None:
    assert flow_of_spec(LayerSpec(nn.Identity)) == WHOLE
    assert flow_of_spec(LayerSpec(Part)) == SHARDED
    assert flow_of_spec(LayerSpec(lambda: Part())) == SHARDED
    assert flow_of_spec(TiedLayerSpec("x", Part)) == SHARDED
    assert flow_of_spec(TiedLayerSpec("x", Part, forward_fn=head)) == SequenceFlow(takes_shard=True)
    assert flow_of_spec(TiedLayerSpec("x", Part, forward_fn=lambda module, x: x)) == WHOLE


@pytest.mark.parametrize("takes", [False, True])
@pytest.mark.parametrize("gives", [False, True])
def test_a_layer_works_on_parts_if_it_takes_or_gives_them(takes: bool, gives: bool) -> None:
    assert SequenceFlow(takes_shard=takes, returns_shard=gives).works_on_shard == (takes or gives)


def activations() -> dict[str, Any]:
    """Return what a user's layer may pass on: tensors along the sequence, and such as are whole everywhere."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(B, S, D, generator=generator, dtype=torch.float64),
        "heads": (torch.randn(B, S, 2 * D, generator=generator, dtype=torch.float64), None),
        "added_mask": torch.randn(B, 1, S, S, generator=generator),
        "mask": torch.rand(B, 1, S, S, generator=generator) > 0.5,
        "token_ids": torch.randint(9, (B, S), generator=generator),
        "many_ids": torch.randint(9, (B, S, 2), generator=generator),
        "lengths": [torch.rand(B, generator=generator), torch.rand(B, S, generator=generator)],
        "loss": torch.tensor(3.0),
    }


def test_tensors_along_the_sequence_are_split_and_joined_and_others_are_left() -> None:
    size, whole = 3, activations()

    def run(group: TensorGroup) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = convert(whole, is_shard=False, wants_shard=True, group=group)
        return parts, convert(parts, is_shard=True, wants_shard=False, group=group)

    for rank, (parts, joined) in enumerate(run_ranks(size, run)):
        own = slice(rank * S // size, (rank + 1) * S // size)
        assert list(parts) == list(joined) == list(whole)
        assert torch.equal(parts["hidden"], whole["hidden"][:, own])
        assert torch.equal(parts["heads"][0], whole["heads"][0][:, own])
        assert parts["heads"][1] is None
        assert isinstance(parts["heads"], tuple)
        for name in ("mask", "added_mask", "token_ids", "many_ids", "loss"):
            assert parts[name] is whole[name]
            assert joined[name] is whole[name]
        assert [a is b for a, b in zip(parts["lengths"], whole["lengths"], strict=True)] == [True, True]
        assert torch.equal(joined["hidden"], whole["hidden"])
        assert torch.equal(joined["heads"][0], whole["heads"][0])


@pytest.mark.parametrize("is_shard", [False, True])
def test_activations_in_the_wanted_form_are_not_converted(is_shard: bool) -> None:
    x = activations()
    assert convert(x, is_shard=is_shard, wants_shard=is_shard, group=PlannedGroup(0, 2)) is x


def test_without_a_group_nothing_is_converted() -> None:
    x = object()
    assert convert(x, is_shard=False, wants_shard=True, group=None) is x


def test_gradients_go_back_the_same_way() -> None:
    """A user's layer between two that work on parts: all ranks compute it alike."""
    size, x = 3, activations()["hidden"].requires_grad_()
    weight = torch.linspace(-1, 1, B * S * D, dtype=torch.float64).reshape(B, S, D)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    ((x.cumsum(1) * scale) ** 2 * weight).sum().backward()

    def run(group: TensorGroup) -> tuple[Tensor | None, Tensor | None]:
        own = x.detach().chunk(size, 1)[group.rank].clone().requires_grad_()
        own_scale = scale.detach().clone().requires_grad_()
        taken = convert((own,), is_shard=True, wants_shard=False, group=group)[0]
        given = (taken.cumsum(1) * own_scale) ** 2
        part = convert({"x": given}, is_shard=False, wants_shard=True, group=group)["x"]
        (part * weight.chunk(size, 1)[group.rank]).sum().backward()
        return own.grad, own_scale.grad

    gradients, scales = zip(*run_ranks(size, run), strict=True)
    torch.testing.assert_close(torch.cat(gradients, 1), x.grad)
    for gradient in scales:
        torch.testing.assert_close(gradient, scale.grad)  # whole on every rank, not a part of it


def test_a_sequence_without_equal_shards_is_refused() -> None:
    with pytest.raises(LayoutError, match="6 tokens cannot be split into 4 equal shards"):
        convert(activations(), is_shard=False, wants_shard=True, group=PlannedGroup(0, 4))


def test_an_output_that_is_not_an_activation_is_named() -> None:
    with pytest.raises(PipekitError, match="the output of a layer holds a int"):
        convert((torch.ones(B, S, D), 3), is_shard=False, wants_shard=True, group=PlannedGroup(0, 2))
