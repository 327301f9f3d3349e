"""Taking over what a DeepSpeed pipeline script has: its layers, its topology, its processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.module import LayerSpec as DeepSpeedLayerSpec
from deepspeed.runtime.pipe.module import TiedLayerSpec as DeepSpeedTiedLayerSpec
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn

from pipekit.deepspeed.patches import use_joined_processes
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.errors import ConfigError, LayoutError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec
from pipekit.layout import DEFAULT_ORDER, Axis, Layout, plan_layout
from pipekit.schedules import Schedule, default_stages_per_rank, schedule_placement

# DeepSpeed's names of the axes.
_AXES: dict[str, Axis] = {"pipe": "pipe", "data": "data", "model": "tensor"}


class Function(nn.Module):
    """A layer without parameters that calls a function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Any) -> Any:
        return self.function(inputs)


class _BuiltLayer(LayerSpec):
    """A layer that was built already, and is given out as it is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(lambda: module)
        self._class_name = type(module).__name__

    @property
    def type_name(self) -> str:
        return self._class_name


def adopt_layers(layers: Sequence[Any] | nn.Sequential) -> list[LayerSpec]:
    """Return a model as specs of pipekit.

    Args:
        layers: specs of pipekit or of DeepSpeed, modules, and functions of one layer's input; or an `nn.Sequential`.

    Raises:
        ConfigError: if an element is none of these.
    """
    if isinstance(layers, nn.Sequential):
        layers = list(layers)
    return [_adopt(layer, layer_idx) for layer_idx, layer in enumerate(layers)]


def _adopt(layer: Any, layer_idx: int) -> LayerSpec:
    if isinstance(layer, LayerSpec):
        return layer
    if isinstance(layer, DeepSpeedTiedLayerSpec):
        return TiedLayerSpec(
            layer.key,
            layer.typename,
            *layer.module_args,
            forward_fn=layer.forward_fn,
            tied_weight_attr=layer.tied_weight_attr,
            **layer.module_kwargs,
        )
    if isinstance(layer, DeepSpeedLayerSpec):
        return LayerSpec(layer.typename, *layer.module_args, **layer.module_kwargs)
    if isinstance(layer, nn.Module):
        return _BuiltLayer(layer)
    if callable(layer) and not isinstance(layer, type):
        return LayerSpec(Function, layer)
    what = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
    raise ConfigError(
        f"layer {layer_idx} is {what}; a layer is a LayerSpec, a module, or a function: write "
        "LayerSpec(nn.Linear, 4, 2)"
    )


def build_mpu(
    num_stages: int | None,
    topology: ProcessTopology | None,
    *,
    schedule: str | Schedule,
    stages_per_rank: int | None,
) -> ModelParallelUnit:
    """Join the other processes, if that has not been done, and return the process groups of all of them.

    Args:
        num_stages: the pipeline-parallel degree, where there is no topology.
        topology: DeepSpeed's.
        schedule: decides, with the next, which stages live on which rank.
        stages_per_rank: stages on each rank; as many as the schedule is made for, unless given.

    Raises:
        LayoutError: if the degrees do not fit the number of processes.
    """
    use_joined_processes()
    layout = _plan_layout(num_stages, topology, dist.get_world_size())
    if isinstance(schedule, Schedule):
        placement = schedule.placement
        if len(schedule.ranks) != layout.pp:
            raise LayoutError(
                f"schedule {schedule.name} has {len(schedule.ranks)} rows, one for each pipeline rank, and "
                f"num_stages={layout.pp}; make both the same"
            )
    else:
        per_rank = stages_per_rank or default_stages_per_rank(schedule)
        placement = schedule_placement(schedule, pp=layout.pp, stages_per_rank=per_rank)
    return ModelParallelUnit(layout, placement=placement)


def _plan_layout(num_stages: int | None, topology: ProcessTopology | None, world_size: int) -> Layout:
    if topology is None:
        if num_stages is None:
            raise LayoutError("PipelineModule needs num_stages, the pipeline-parallel degree, or a topology")
        if world_size % num_stages != 0:
            fitting = [str(degree) for degree in range(1, world_size + 1) if world_size % degree == 0]
            raise LayoutError(
                f"num_stages={num_stages} does not divide the {world_size} processes; try {' or '.join(fitting)}"
            )
        return plan_layout(pp=num_stages, tp=1, dp=world_size // num_stages, world_size=world_size, num_devices=None)
    axes = list(topology.get_axis_names())
    unknown = [axis for axis in axes if axis not in _AXES]
    if unknown:
        raise LayoutError(
            f"the topology has the axis {unknown[0]!r}, and pipekit knows pipe, data and model, in any order; use "
            "PipeModelDataParallelTopology, or ProcessTopology(axes=['pipe', 'data', 'model'], dims=[...])"
        )
    # DeepSpeed gives 0 for an axis that is not there. Wherever that stands among the others, ranks are the same.
    pp, dp, tp = (max(1, topology.get_dim(axis)) for axis in ("pipe", "data", "model"))
    named = [_AXES[axis] for axis in axes]
    order = next(
        order for order in permutations(DEFAULT_ORDER, 3) if [axis for axis in order if axis in named] == named
    )
    return plan_layout(pp=pp, tp=tp, dp=dp, world_size=world_size, num_devices=None, order=order)
