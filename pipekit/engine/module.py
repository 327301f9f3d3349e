"""The layers of one stage: built from their specs, seeded by name, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

Activations = Tensor | tuple[Tensor, ...]
LossFunction = Callable[[Any, Any], Tensor]


class PipelineModule(DeepSpeedPipelineModule):  # type: ignore[misc]
    """The stage of a model that this rank holds.

    Only the layers of this stage are built. Each starts from weights that depend on the seed and the layer's name
    alone, so they are the same under every layout.

    It is a DeepSpeed `PipelineModule` to DeepSpeed's engine, but does not run that class's constructor, which would
    make groups, partition, build every layer on every rank to count it, and move, all in one.

    Args:
        layers: the whole model.
        mpu: the process groups.
        boundaries: `pp + 1` layer indices; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        loss_fn: called on the last stage as `loss_fn(outputs, labels)`; returns a scalar.
        seed: of the initial weights and of dropout.
        activation_checkpointing: keep only each layer's input, and recompute the rest in the backward.
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
        activation_checkpointing: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        nn.Module.__init__(self)
        self.layer_specs = list(layers)
        self.layer_names = layer_names(layers)
        self.loss_fn = loss_fn
        self.seed = seed
        self.activation_checkpointing = activation_checkpointing
        self.num_stages = mpu.layout.pp
        self.stage_id = mpu.pipe_rank
        self._present_to_deepspeed(mpu, boundaries)
        self._build_stage()
        self.to(device)
        self.tied_comms = self._build_tied_groups(mpu)

    def _present_to_deepspeed(self, mpu: ModelParallelUnit, boundaries: Sequence[int]) -> None:
        """Set the attributes that DeepSpeed's engine reads from its own module."""
        layout = mpu.layout
        self.parts = list(boundaries)
        self.global_rank = mpu.global_rank
        self._grid = mpu
        self._topo = PipeModelDataParallelTopology(num_pp=layout.pp, num_dp=layout.dp, num_mp=layout.tp)
        self._layer_specs = self.layer_specs
        self._num_layers = len(self.layer_specs)
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])
        self.forward_funcs: list[Callable[[Any], Any]] = []
        self.tied_modules = nn.ModuleDict()
        self.tied_weight_attrs: dict[str, list[str]] = {}
        self.activation_checkpoint_interval = 0
        self.activation_checkpoint_func = deepspeed_checkpointing.checkpoint
        self.dynamic_shape = False

    @property
    def layer_range(self) -> range:
        """The indices of the layers that this stage holds."""
        return range(self._local_start, self._local_stop)

    def _build_stage(self) -> None:
        for layer_idx in self.layer_range:
            spec = self.layer_specs[layer_idx]
            name = self.layer_names[layer_idx]
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = build_layer(spec, name=name, seed=self.seed)
                    self.tied_weight_attrs[spec.key] = spec.tied_weight_attr
                module = self.tied_modules[spec.key]
                self.forward_funcs.append(partial(spec.forward_fn, module) if spec.forward_fn else module)
            else:
                module = build_layer(spec, name=name, seed=self.seed)
                self.add_module(str(layer_idx), module)
                self.forward_funcs.append(module)
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def _build_tied_groups(self, mpu: ModelParallelUnit) -> dict[str, dict[str, Any]]:
        """Create a group for the stages that share each tied key; every rank takes part in every creation."""
        stages_of_key: dict[str, set[int]] = {}
        for layer_idx, spec in enumerate(self.layer_specs):
            if isinstance(spec, TiedLayerSpec):
                stages_of_key.setdefault(spec.key, set()).add(self.stage_owner(layer_idx))
        comms: dict[str, dict[str, Any]] = {}
        for key, stages in sorted(stages_of_key.items()):
            if len(stages) == 1:
                continue
            group = mpu.build_group(
                [
                    [mpu.layout.rank(pipe=stage, data=data, tensor=tensor) for stage in sorted(stages)]
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
                # The gradient norm counts a shared parameter once: on the first stage that holds it.
                for attr in attrs:
                    self._recursive_getattr(module, attr).ds_pipe_replicated = True
        return comms

    def forward_stage(self, inputs: Activations, *, dropout_path: tuple[int, int] | None = None) -> Activations:
        """Run this stage's layers on one micro-batch.

        Args:
            inputs: what the previous stage returned, or the micro-batch's inputs on the first.
            dropout_path: the step and the index of the micro-batch in the global batch, which together with a layer's
                index seed what that layer draws; None draws from the current generator state.
        """
        for layer_idx, layer in zip(self.layer_range, self.forward_funcs, strict=True):
            seed = None if dropout_path is None else fold_seed(self.seed, "layer", *dropout_path, layer_idx)
            run = partial(_run_layer, layer, seed)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # The seed is set again inside the recomputation, so the generator's state need not be kept.
                inputs = checkpoint(run, inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                inputs = run(inputs)
        return inputs

    def named_logical_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield `(logical name, parameter, owned)` for each parameter of this stage.

        A tied parameter lives on several stages under one name; the first of them owns it.
        """
        for name, tensor, owned in self._named_logical(nn.Module.named_parameters):
            assert isinstance(tensor, nn.Parameter)
            yield name, tensor, owned

    def named_logical_buffers(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield `(logical name, buffer, owned)` for each persistent buffer of this stage."""
        yield from self._named_logical(_persistent_buffers)

    def _named_logical(
        self, named: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]
    ) -> Iterator[tuple[str, Tensor, bool]]:
        seen: set[str] = set()
        for layer_idx in self.layer_range:
            spec, layer_name = self.layer_specs[layer_idx], self.layer_names[layer_idx]
            if layer_name in seen:
                continue
            seen.add(layer_name)
            if isinstance(spec, TiedLayerSpec):
                module, owned = self.tied_modules[spec.key], self.layer_names.index(layer_name) in self.layer_range
            else:
                module, owned = self.get_submodule(str(layer_idx)), True
            for name, tensor in named(module):
                yield f"{layer_name}.{name}", tensor, owned


def _run_layer(layer: Callable[[Any], Any], seed: int | None, inputs: Activations) -> Activations:
    if seed is not None:
        torch.manual_seed(seed)
    outputs: Activations = layer(inputs)
    return outputs


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in parameters:
            yield name, tensor
