"""A model whose layers a tensor group has cut, and what its ranks have, put together: for tests."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_layer, flow_of_spec, layer_names
from pipekit.tensor_parallel import WHOLE, TensorGroup, has_partial_gradient, shard_layer, shard_of
from pipekit.tensor_parallel.flow import convert

# Ranks may be threads, and initial weights are drawn from the process's generator.
_building = threading.Lock()


class CutModel:
    """Layers that are built whole and cut, and run as a pipeline's stage runs them.

    Args:
        specs: the layers.
        group: the tensor-parallel peers; None leaves all layers whole.
        sequence_parallel: whether layers that can do so work on their part of the sequence.
        seed: of the initial weights.
        weights: logical tensors to start from, in place of the initial weights.
        dtype: of the parameters, once they are cut.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        group: TensorGroup | None,
        *,
        sequence_parallel: bool,
        seed: int = 0,
        weights: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.specs, self.names, self.group = list(specs), layer_names(specs), group
        self.flows = [flow_of_spec(spec) if sequence_parallel else WHOLE for spec in specs]
        self.layers: dict[str, nn.Module] = {}
        for spec, name in zip(self.specs, self.names, strict=True):
            if name in self.layers:
                continue
            with _building:
                layer = build_layer(spec, name=name, seed=seed)
            if weights is not None:
                layer.load_state_dict({key: weights[f"{name}.{key}"] for key in layer.state_dict()})
            if group is not None:
                flows = (flow for flow, other in zip(self.flows, self.names, strict=True) if other == name)
                shard_layer(layer, group, sequence_parallel=any(flow.works_on_shard for flow in flows))
            self.layers[name] = layer.to(dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters by their logical names."""
        return {
            f"{name}.{key}": parameter
            for name, layer in self.layers.items()
            for key, parameter in layer.named_parameters()
        }

    def __call__(self, activations: Any) -> Any:
        is_shard = False
        for spec, name, flow in zip(self.specs, self.names, self.flows, strict=True):
            taken = convert(activations, is_shard=is_shard, wants_shard=flow.takes_shard, group=self.group)
            layer = self.layers[name]
            tied = isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None
            activations = spec.forward_fn(layer, taken) if tied else layer(taken)  # type: ignore[attr-defined]
            is_shard = flow.returns_shard
        return convert(activations, is_shard=is_shard, wants_shard=False, group=self.group)


def join_parameters(ranks: Sequence[Mapping[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Return the logical tensors of the parameters that the ranks have; what all have whole must be equal."""
    joined = {}
    for name, first in ranks[0].items():
        parts = [rank[name].detach() for rank in ranks]
        shard = shard_of(first)
        if shard is None:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
        joined[name] = parts[0] if shard is None else shard.join(parts)
    return joined


def join_gradients(ranks: Sequence[Mapping[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Return the gradients of the logical tensors, as the engine makes them of the ranks' gradients.

    Those of a whole parameter must be equal, unless they are partial. Frozen parameters must have none.
    """
    joined = {}
    for name, first in ranks[0].items():
        if not first.requires_grad:
            assert all(rank[name].grad is None for rank in ranks), f"{name} is frozen, and has a gradient"
            continue
        gradients = [rank[name].grad for rank in ranks]
        parts = [gradient for gradient in gradients if gradient is not None]
        assert len(parts) == len(ranks), f"{name} has no gradient on some rank"
        shard = shard_of(first)
        if shard is not None:
            joined[name] = shard.join(parts)
        elif has_partial_gradient(first):
            joined[name] = torch.stack(parts).sum(0)
        else:
            for part in parts[1:]:
                torch.testing.assert_close(part, parts[0], msg=f"the gradient of {name} differs between ranks")
            joined[name] = parts[0]
    return joined


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float = 1e-10) -> None:
    """Check that tensors of the same names are close, and name the one that is not."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
