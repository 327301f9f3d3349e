"""Layer specs as one torch module, whole or one rank's part, for checks of exports and for text generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from pipekit.errors import CheckpointError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_layer, build_on_meta, layer_names
from pipekit.tensor_parallel import TensorGroup, shard_layer, whole_outputs


class SequentialModel(nn.Module):
    """Torch module of a model's layers in sequence; tied layers share one module.

    Args:
        specs: the model.
        seed: seed of the initial weights, which equal those of a pipeline under any layout; None allocates no weights,
            for a model whose tensors will all come from `load_logical_tensors`.
        layers: indices of the layers to build, such as one stage of a pipeline; by default all layers.
        group: tensor-parallel peers; the model keeps only this rank's shards.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        *,
        seed: int | None = 1234,
        layers: range | None = None,
        group: TensorGroup | None = None,
    ) -> None:
        super().__init__()
        layers = range(len(specs)) if layers is None else layers
        all_names = layer_names(specs)
        specs, self.names = [specs[layer_idx] for layer_idx in layers], [all_names[layer_idx] for layer_idx in layers]
        self.steps: list[Any] = []
        modules: dict[str, nn.Module] = {}
        for spec, name in zip(specs, self.names, strict=True):
            if name not in modules:
                built = build_on_meta(spec, name=name) if seed is None else build_layer(spec, name=name, seed=seed)
                if group is not None:
                    shard_layer(built, group, sequence_parallel=False)
                modules[name] = built
            module = modules[name]
            forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
            self.steps.append(partial(forward_fn, module) if forward_fn else module)
        # Logical names have dots, which module names must not.
        self._module_names = list(modules)
        self.layers = nn.ModuleList(modules.values())

    def forward(self, inputs: Any) -> Any:
        """Run all layers and return the output of the last; in evaluation mode, `Logits` become a tensor."""
        for step in self.steps:
            inputs = step(inputs)
        return inputs if torch.is_grad_enabled() else whole_outputs(inputs)

    def logical_tensors(self) -> dict[str, Tensor]:
        """Return every parameter and persistent buffer under its logical name.

        Tied tensors are returned once. A parameter that a layer holds under several names is returned under the first.
        """
        tensors: dict[str, Tensor] = {}
        for layer_name, layer in zip(self._module_names, self.layers, strict=True):
            parameters = dict(layer.named_parameters())
            repeated = dict(layer.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
            for name, tensor in layer.state_dict(keep_vars=True).items():
                if name not in repeated:
                    tensors[f"{layer_name}.{name}"] = tensor
        return tensors

    def check_logical_tensors(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Check the names and shapes of tensors for this model; they may be on torch's meta device.

        Raises:
            CheckpointError: if a tensor is missing, has another shape, or is unknown; `where` names the source.
        """
        own_tensors = self.logical_tensors()
        for name in tensors:
            if name not in own_tensors:
                raise CheckpointError(f"{where}: holds {name}, which the model has not; it belongs to another model")
        for name, own in own_tensors.items():
            if name not in tensors or tensors[name].shape != own.shape:
                found = "is missing" if name not in tensors else f"is {tuple(tensors[name].shape)}"
                rule = f"and the model has {tuple(own.shape)}; it belongs to another model"
                raise CheckpointError(f"{where}: {name} {found}, {rule}")

    def load_logical_tensors(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Load every parameter and buffer; those that are not allocated become the given tensors.

        Raises:
            CheckpointError: if the tensors do not fit the model; `where` names the source.
        """
        self.check_logical_tensors(tensors, where=where)
        for name, own in self.logical_tensors().items():
            if own.is_meta:
                given = tensors[name].detach().to(own.dtype)
                if isinstance(own, nn.Parameter):
                    given = nn.Parameter(given, requires_grad=own.requires_grad)
                swap_tensors(own, given)  # type: ignore[no-untyped-call]
            else:
                with torch.no_grad():
                    own.copy_(tensors[name])


@torch.no_grad()
def run_layers(
    specs: Sequence[LayerSpec], inputs: Any, *, read: Callable[[str], Tensor], seed: int | None = None
) -> Iterator[tuple[str, Any]]:
    """Run a model in evaluation mode with one layer in memory at a time; yield the name and the outputs of each.

    Args:
        specs: the model.
        inputs: inputs of the first layer.
        read: returns a tensor by its logical name; it is called again for each layer that shares a tied tensor.
        seed: as in `SequentialModel`.
    """
    for layer_idx, name in enumerate(layer_names(specs)):
        layer = SequentialModel(specs, seed=seed, layers=range(layer_idx, layer_idx + 1)).eval()
        layer.load_logical_tensors({own: read(own) for own in layer.logical_tensors()}, where=name)
        inputs = layer(inputs)
        yield name, inputs
