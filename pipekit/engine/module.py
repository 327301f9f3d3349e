"""The layers of a rank's stages: built from their specs, seeded by name, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing import checkpointing as deepspeed_checkpointing
from deepspeed.runtime.pipe.module import PipelineModule as DeepSpeedPipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipekit.engine.mpu import ModelParallelUnit
from pipekit.rng import fold_seed
from pipekit.specs import LayerSpec, TiedLayerSpec, build_layer, layer_names
from pipekit.weight_gradients import split_linear

Activations = Any
"""What passes between layers: a tensor, or tuples, lists and dicts of tensors."""

LossFunction = Callable[[Any, Any], Tensor]


class PipelineModule(DeepSpeedPipelineModule):  # type: ignore[misc]
    """The stages of a model that this rank holds.

    Only the layers of these stages are built. Each starts from weights that depend on the seed and the layer's name
    alone, so they are the same under every layout.

    It is a DeepSpeed `PipelineModule` to DeepSpeed's engine, but does not run that class's constructor, which would
    make groups, partition, build every layer on every rank to count it, and move, all in one.

    Args:
        layers: the whole model.
        mpu: the process groups.
        boundaries: one more layer index than stages; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        loss_fn: called on the last stage as `loss_fn(outputs, labels)`; returns a scalar.
        seed: of the initial weights and of dropout.
        activation_checkpointing: keep only the input of each layer, or of every so many, and recompute the rest in the
            backward.
        device: where the layers live.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        mpu: ModelParallelUnit,
        boundaries: Sequence[int],
        loss_fn: LossFunction | None,
        seed: int = 1234,
        activation_checkpointing: bool | int = False,
        device: torch.device | str = "cpu",
    ) -> None:
        nn.Module.__init__(self)
        self.layer_specs = list(layers)
        self.layer_names = layer_names(layers)
        self.loss_fn = loss_fn
        self.seed = seed
        self.activation_checkpointing = activation_checkpointing
        self.boundaries = list(boundaries)
        self.stages = mpu.stages
        self._present_to_deepspeed(mpu)
        self._build_stages()
        self.to(device)
        self.tied_comms = self._build_tied_groups(mpu)

    def _present_to_deepspeed(self, mpu: ModelParallelUnit) -> None:
        """Set the attributes that DeepSpeed's engine reads from its own module."""
        layout = mpu.layout
        self.num_stages = layout.pp
        self.stage_id = mpu.pipe_rank
        self.parts = self.boundaries
        self.global_rank = mpu.global_rank
        self._grid = mpu
        self._topo = PipeModelDataParallelTopology(num_pp=layout.pp, num_dp=layout.dp, num_mp=layout.tp)
        self._layer_specs = self.layer_specs
        self._num_layers = len(self.layer_specs)
        self._set_bounds(self.layer_indices[0], self.layer_indices[-1] + 1)
        self.forward_funcs: list[Callable[[Any], Any]] = []
        self.tied_modules = nn.ModuleDict()
        self.tied_weight_attrs: dict[str, list[str]] = {}
        self.activation_checkpoint_interval = 0
        self.activation_checkpoint_func = deepspeed_checkpointing.checkpoint
        self.dynamic_shape = False

    def layers_of(self, stage: int) -> range:
        """The indices of the layers that a stage holds."""
        return range(self.boundaries[stage], self.boundaries[stage + 1])

    @property
    def layer_indices(self) -> list[int]:
        """The indices of the layers that this rank holds."""
        return [layer_idx for stage in self.stages for layer_idx in self.layers_of(stage)]

    def _build_stages(self) -> None:
        self._layers: dict[int, Callable[[Any], Any]] = {}
        for layer_idx in self.layer_indices:
            spec = self.layer_specs[layer_idx]
            name = self.layer_names[layer_idx]
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = build_layer(spec, name=name, seed=self.seed)
                    self.tied_weight_attrs[spec.key] = spec.tied_weight_attr
                module = self.tied_modules[spec.key]
                self._layers[layer_idx] = partial(spec.forward_fn, module) if spec.forward_fn else module
            else:
                module = build_layer(spec, name=name, seed=self.seed)
                self.add_module(str(layer_idx), module)
                self._layers[layer_idx] = module
        self.forward_funcs = list(self._layers.values())
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def _build_tied_groups(self, mpu: ModelParallelUnit) -> dict[str, dict[str, Any]]:
        """Create a group for the ranks that share each tied key; every rank takes part in every creation."""
        pipe_ranks_of_key: dict[str, list[int]] = {}
        for stage, pipe_rank in enumerate(mpu.placement):
            for layer_idx in self.layers_of(stage):
                spec = self.layer_specs[layer_idx]
                if isinstance(spec, TiedLayerSpec) and pipe_rank not in pipe_ranks_of_key.setdefault(spec.key, []):
                    pipe_ranks_of_key[spec.key].append(pipe_rank)
        comms: dict[str, dict[str, Any]] = {}
        for key, pipe_ranks in sorted(pipe_ranks_of_key.items()):
            if len(pipe_ranks) == 1:
                continue
            group = mpu.build_group(
                [
                    [mpu.layout.rank(pipe=pipe_rank, data=data, tensor=tensor) for pipe_rank in pipe_ranks]
                    for data in range(mpu.layout.dp)
                    for tensor in range(mpu.layout.tp)
                ]
            )
            if group is None:
                continue
            module, attrs = self.tied_modules[key], self.tied_weight_attrs[key]
            comms[key] = {
                "ranks": group.ranks,
                "group": group.process_group,
                "weight_attr": attrs,
                "module": module,
            }
            if mpu.global_rank != group.ranks[0]:
                # The gradient norm counts a shared parameter once: on the rank that holds it first.
                for attr in attrs:
                    self._recursive_getattr(module, attr).ds_pipe_replicated = True
        return comms

    def forward_stage(
        self,
        stage: int,
        inputs: Activations,
        *,
        dropout_path: tuple[int, int] | None = None,
        split_backward: bool = False,
    ) -> Activations:
        """Run one stage's layers on one micro-batch.

        Args:
            stage: one of this rank's.
            inputs: what the previous stage returned, or the micro-batch's inputs on the first.
            dropout_path: the step and the index of the micro-batch in the global batch, which together with a layer's
                index seed what that layer draws; None draws from the current generator state.
            split_backward: whether the backward may hand the weight gradients of linear layers over.
        """
        layers = self.layers_of(stage)
        interval = int(self.activation_checkpointing) if torch.is_grad_enabled() else 0
        for first in layers[:: interval or len(layers)]:
            run = partial(self._run_layers, layers[first - layers.start :][: interval or None], dropout_path, split_backward)
            if interval:
                # The seeds are set again inside the recomputation, so the generator's state need not be kept.
                inputs = checkpoint(run, inputs, use_reentrant=False, preserve_rng_state=dropout_path is None)
            else:
                inputs = run(inputs)
        return inputs

    def _run_layers(
        self, layers: range, dropout_path: tuple[int, int] | None, split_backward: bool, inputs: Activations
    ) -> Activations:
        with split_linear() if split_backward else nullcontext():
            for layer_idx in layers:
                if dropout_path is not None:
                    torch.manual_seed(fold_seed(self.seed, "layer", *dropout_path, layer_idx))
                inputs = self._layers[layer_idx](inputs)
        return inputs

    def stage_parameters(self, stage: int) -> list[nn.Parameter]:
        """Return the trainable parameters of one of this rank's stages."""
        modules = (self._module_of(layer_idx) for layer_idx in self.layers_of(stage))
        parameters = (parameter for module in modules for parameter in module.parameters() if parameter.requires_grad)
        return list(dict.fromkeys(parameters))

    def _module_of(self, layer_idx: int) -> nn.Module:
        spec = self.layer_specs[layer_idx]
        if isinstance(spec, TiedLayerSpec):
            return self.tied_modules[spec.key]
        return self.get_submodule(str(layer_idx))

    def named_logical_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield `(logical name, parameter, owned)` for each parameter of this rank.

        A tied parameter lives on several ranks under one name; the one with its first layer owns it.
        """
        for name, tensor, owned in self._named_logical(nn.Module.named_parameters):
            assert isinstance(tensor, nn.Parameter)
            yield name, tensor, owned

    def named_logical_buffers(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield `(logical name, buffer, owned)` for each persistent buffer of this rank."""
        yield from self._named_logical(_persistent_buffers)

    def _named_logical(
        self, named: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]
    ) -> Iterator[tuple[str, Tensor, bool]]:
        seen: set[str] = set()
        held = set(self.layer_indices)
        for layer_idx in self.layer_indices:
            layer_name = self.layer_names[layer_idx]
            if layer_name in seen:
                continue
            seen.add(layer_name)
            owned = self.layer_names.index(layer_name) in held
            for name, tensor in named(self._module_of(layer_idx)):
                yield f"{layer_name}.{name}", tensor, owned


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in parameters:
            yield name, tensor
