"""Pipeline modules: the layers of a rank's stages, built from their specs, seeded by name and run in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing import checkpointing as deepspeed_checkpointing
from deepspeed.runtime.pipe.module import PipelineModule as DeepSpeedPipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipekit.deepspeed.mpu import DeepSpeedMPU
from pipekit.deepspeed.ported_scripts import adopt_layers, build_mpu
from pipekit.deepspeed.weight_partitioner import WeightPartitioner
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.mpu_check import check_mpu
from pipekit.engine.layer_files import load_layers, save_layers
from pipekit.engine.logical_model import persistent_buffers
from pipekit.engine.tensor_group import ProcessTensorGroup
from pipekit.errors import ConfigError, PipekitError
from pipekit.layers.attention_core import recompute_attention
from pipekit.layers.layer_drop import LayerDrop, number_blocks
from pipekit.layers.parameters import count_layer_parameters
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_layer, flow_of_spec, layer_names
from pipekit.partitioners import PartitionInputs, partition
from pipekit.rng import fold_seed
from pipekit.schedules import Schedule
from pipekit.settings.activations import KEY, ActivationCheckpointing
from pipekit.tensor_parallel import SequenceFlow, shard_layer, shard_of
from pipekit.tensor_parallel.flow import convert
from pipekit.tensor_parallel.kept_inputs import KeptInputs
from pipekit.tensors.nested import map_tensors
from pipekit.tensors.weight_gradients import split_linear, split_uncompiled_linear

Activations = Any
"""Values that pass between layers: a tensor, or tuples, lists and dicts of tensors."""

LossFunction = Callable[[Any, Any], Tensor]

LayerObserver = Callable[[int, Activations, tuple[int, int] | None], None]
"""Called with a layer's index, its output, and the `dropout_path` of its micro-batch. Under activation checkpointing it
is called again when the layer is recomputed."""


class PipelineModule(DeepSpeedPipelineModule):  # type: ignore[misc]
    """Pipeline module: the stages of a model that this rank holds.

    Only the layers of these stages are built. Initial weights depend only on the seed and the layer's name, so they are
    the same under every layout.

    To DeepSpeed's engine it is a DeepSpeed `PipelineModule`, but it does not run that class's constructor, which would
    make groups, partition, build every layer on every rank to count it, and move the layers, all at once.

    It takes the arguments of DeepSpeed's module: without `mpu` it makes the layout from `num_stages` or `topology` and
    the number of processes, and partitions the model by `partition_method`.

    Args:
        layers: the whole model: specs of pipekit or DeepSpeed, modules, or functions.
        num_stages: the pipeline-parallel degree, if neither `topology` nor `mpu` is given.
        topology: DeepSpeed's process topology.
        loss_fn: called on the last stage as `loss_fn(outputs, labels)`; returns a scalar. None if the last layer
            returns the loss.
        seed_layers: must not be False: a layer's initial weights and random numbers always depend only on the seed and
            the layer.
        seed_fn: called with a layer's seed before each layer is built and run, in place of `torch.manual_seed`.
        base_seed: seed of the initial weights and of dropout.
        partition_method: `parameters`, `uniform` or `type:<regex>`.
        activation_checkpoint_interval: number of layers in a group. Only the input of each group is kept, and its
            layers are recomputed in the backward; 0 keeps all activations.
        activation_checkpoint_func: torch's or DeepSpeed's function; torch's is used, with any inputs and outputs.
        checkpointable_layers: class names of layers to checkpoint; all layers by default.
        dynamic_shape: whether shapes change from step to step; they always may.
        schedule: schedule that the engine runs: a name, the path of a CSV file, or a table.
        stages_per_rank: number of stages on each rank; the default depends on the schedule.
        mpu: the process groups. The values of a subclass of `ModelParallelUnit` are first compared over all ranks.
        boundaries: one more layer index than stages; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
            By default the model is partitioned by `partition_method`.
        device: device of the layers; by default the accelerator of this process.
        sequence_parallel: whether tensor-parallel ranks each keep a shard of the sequence between layers that can work
            on shards.
        checkpointing: layers that are recomputed one by one in the backward, and where their inputs are kept; in place
            of `activation_checkpoint_interval`.
        compile_layers: whether torch compiles the layers whose class occurs more than once in the model, each class
            once. Random numbers are the same as in uncompiled layers.
        loss_weight: called on the last stage as `loss_weight(labels)`; returns the weight of a micro-batch in the mean
            loss of the global batch. None gives all the same weight.
        layer_drop: probabilities of dropping blocks in training; None keeps all blocks.
        deepspeed_config: configuration of the engine that will be built. With it, under ZeRO-3, each layer is sharded
            over the replicas as soon as it is built, so no rank ever holds the whole model; otherwise the engine shards
            all layers at once.

    Raises:
        PipekitError: if layers, degrees and processes do not fit together.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: LossFunction | None = None,
        seed_layers: bool = True,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] | None = None,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = True,
        *,
        schedule: str | Schedule = "1f1b",
        stages_per_rank: int | None = None,
        mpu: ModelParallelUnit | None = None,
        boundaries: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        sequence_parallel: bool = True,
        checkpointing: ActivationCheckpointing | None = None,
        compile_layers: bool = False,
        loss_weight: Callable[[Any], Tensor | None] | None = None,
        layer_drop: LayerDrop | None = None,
        deepspeed_config: Mapping[str, Any] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not seed_layers:
            raise ConfigError("PipelineModule always seeds its layers; leave seed_layers out, or set it to True")
        if activation_checkpoint_func not in (None, checkpoint, deepspeed_checkpointing.checkpoint):
            raise ConfigError(
                "PipelineModule checkpoints activations with torch.utils.checkpoint alone; leave "
                "activation_checkpoint_func out"
            )
        if checkpointing is not None and activation_checkpoint_interval:
            raise ConfigError(
                f"PipelineModule(activation_checkpoint_interval={activation_checkpoint_interval}) and checkpointing= "
                "both choose layers to recompute; leave one of them out"
            )
        self.layer_specs = recompute_attention(adopt_layers(layers), checkpointing)
        self.layer_names = layer_names(self.layer_specs)
        self.loss_fn, self.loss_weight = loss_fn, loss_weight
        self.layer_drop = layer_drop
        self._blocks = {} if layer_drop is None else number_blocks(self.layer_specs)
        self.seed = base_seed
        self._seed = seed_fn or _seed_generators
        self.checkpointable_layers = None if checkpointable_layers is None else set(checkpointable_layers)
        self.schedule = schedule
        self.stages_per_rank = stages_per_rank
        if mpu is None:
            mpu = build_mpu(num_stages, topology, schedule=schedule, stages_per_rank=stages_per_rank)
        elif type(mpu) is not ModelParallelUnit:
            check_mpu(mpu)
        self.boundaries = list(boundaries or self._cut(partition_method, mpu.placement))
        self.stages = mpu.stages
        self.tensor_group = ProcessTensorGroup(mpu.tensor) if mpu.layout.tp > 1 else None
        self.sequence_parallel = sequence_parallel and self.tensor_group is not None
        self.activation_checkpointing = activation_checkpoint_interval
        self._recomputed = [True] * len(self.layer_specs)
        self._kept_inputs = KeptInputs()
        if checkpointing is not None and checkpointing.only is None:
            self.activation_checkpointing = 1
            self._recomputed = checkpointing.chosen(self.layer_names)
            self.keep_inputs(partition=checkpointing.partition, offload=checkpointing.offload)
        self.observe_layer: LayerObserver | None = None
        self._split_linear = split_uncompiled_linear() if compile_layers else split_linear
        self._present_to_deepspeed(mpu)
        self.partitioner: WeightPartitioner | None = None
        if deepspeed_config is not None and deepspeed_config.get("zero_optimization", {}).get("stage") == 3:
            self.partitioner = WeightPartitioner(deepspeed_config, mpu)
        self._build_stages()
        if compile_layers:
            self._compile_layers()
        self.idle: nn.Parameter | None = None
        if not any(parameter.requires_grad for parameter in self.parameters()):
            # Neither DeepSpeed nor torch's optimizers take a rank without parameters; an idle one keeps it in step.
            self.idle = nn.Parameter(torch.zeros(1))
            self.idle.ds_pipe_replicated = True  # type: ignore[attr-defined]
        self.to(get_accelerator().current_device_name() if device is None else device)
        if self.partitioner is not None:
            self.partitioner.partition(self)
        self.tied_comms = self._build_tied_groups(mpu)

    def keep_inputs(self, *, partition: bool = False, offload: bool = False) -> None:
        """Keep the inputs of recomputed layers as shards over the tensor-parallel ranks, in host memory, or both.

        Inputs that are already shards of the sequence stay unchanged, and so do inputs of stages, which must be whole.

        Raises:
            ConfigError: if inputs are to be sharded with only one tensor-parallel rank.
        """
        if partition and self.tensor_group is None:
            raise ConfigError(
                f"{KEY}.partition=true shares inputs out over tensor-parallel ranks, and there is one; leave it out"
            )
        before = self._kept_inputs
        group = self.tensor_group if partition else before.group
        self._kept_inputs = KeptInputs(group, offload=offload or before.offload)

    def _cut(self, method: str, placement: Sequence[int]) -> list[int]:
        facts = PartitionInputs(
            [spec.type_name for spec in self.layer_specs],
            lambda: count_layer_parameters(self.layer_specs),
            layer_names=layer_names(self.layer_specs),
            placement=placement,
        )
        return partition(method, facts, len(placement))

    def _present_to_deepspeed(self, mpu: ModelParallelUnit) -> None:
        """Set the attributes that DeepSpeed's engine reads from its own module."""
        layout = mpu.layout
        self.num_stages = layout.pp
        self.stage_id = mpu.pipe_rank
        self.parts = self.boundaries
        self.global_rank = mpu.global_rank
        self._mpu = mpu
        self._grid = DeepSpeedMPU(mpu)
        self._topo = self._grid.topology()
        self._layer_specs = self.layer_specs
        self._num_layers = len(self.layer_specs)
        self._set_bounds(self.layer_indices[0], self.layer_indices[-1] + 1)
        self.forward_funcs: list[Callable[[Any], Any]] = []
        self.tied_modules = nn.ModuleDict()
        self.tied_weight_attrs: dict[str, list[str]] = {}
        self.activation_checkpoint_interval = 0
        self.activation_checkpoint_func = deepspeed_checkpointing.checkpoint
        self.dynamic_shape = True

    def mpu(self) -> ModelParallelUnit:
        """The process groups."""
        return self._mpu

    def layers_of(self, stage: int) -> range:
        """Indices of a stage's layers."""
        return range(self.boundaries[stage], self.boundaries[stage + 1])

    @property
    def layer_indices(self) -> list[int]:
        """Indices of the layers that this rank holds."""
        return [layer_idx for stage in self.stages for layer_idx in self.layers_of(stage)]

    def _build_stages(self) -> None:
        self._layers: dict[int, Callable[[Any], Any]] = {}
        # Of the layers here, and of those before them, whose outputs come from another rank.
        self._flows = {
            layer_idx: flow_of_spec(self.layer_specs[layer_idx]) if self.sequence_parallel else SequenceFlow()
            for held in self.layer_indices
            for layer_idx in (held - 1, held)
            if layer_idx >= 0
        }
        for layer_idx in self.layer_indices:
            spec = self.layer_specs[layer_idx]
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = self._build_layer(layer_idx)
                    self.tied_weight_attrs[spec.key] = spec.tied_weight_attr
                module = self.tied_modules[spec.key]
                self._layers[layer_idx] = partial(spec.forward_fn, module) if spec.forward_fn else module
            else:
                module = self._build_layer(layer_idx)
                self.add_module(str(layer_idx), module)
                self._layers[layer_idx] = module
        self.forward_funcs = list(self._layers.values())
        is_counted_elsewhere = self.tensor_group is not None and self.tensor_group.rank > 0
        for parameter in self.parameters():
            # What all tensor-parallel ranks hold whole, the first of them counts in the gradient norm.
            parameter.ds_pipe_replicated = is_counted_elsewhere and shard_of(parameter) is None

    def _compile_layers(self) -> None:
        counts = Counter(spec.type_name for spec in self.layer_specs)
        tied = set(self.tied_modules.values())
        for layer_idx in self.layer_indices:
            layer = self._layers[layer_idx]
            # Tied layers may be embedding and head: two shapes, and a function between.
            if isinstance(layer, nn.Module) and counts[self.layer_specs[layer_idx].type_name] > 1 and layer not in tied:
                layer.compile(dynamic=False, options={"fallback_random": True})

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile each layer of this rank separately; the arguments are those of `torch.compile`."""
        self._split_linear = split_uncompiled_linear()
        for layer_idx, layer in self._layers.items():
            if isinstance(layer, nn.Module):
                layer.compile(*args, **options)
            else:
                self._layers[layer_idx] = torch.compile(layer, *args, **options)

    def save_state_dict(
        self, save_dir: str | Path, checkpoint_engine: Any = None, exclude_frozen_params: bool = False
    ) -> None:
        """Write a file for each layer, as DeepSpeed does; see `save_layers`. No `checkpoint_engine` is needed."""
        save_layers(self, Path(save_dir), exclude_frozen=exclude_frozen_params)

    def load_state_dir(self, load_dir: str | Path, checkpoint_engine: Any = None, strict: bool = True) -> None:
        """Read the files of the layers; see `load_layers`. No `checkpoint_engine` is needed."""
        load_layers(self, Path(load_dir), strict=strict)

    def _build_layer(self, layer_idx: int) -> nn.Module:
        spec = self.layer_specs[layer_idx]
        layer = build_layer(spec, name=self.layer_names[layer_idx], seed=self.seed)
        if self.tensor_group is not None:
            works_on_shard = self.sequence_parallel and any(
                flow_of_spec(same).works_on_shard for same in self._sharing(spec)
            )
            shard_layer(layer, self.tensor_group, sequence_parallel=works_on_shard)
        if self.partitioner is not None:
            self.partitioner.partition(layer)
        return layer

    def _sharing(self, spec: LayerSpec) -> list[LayerSpec]:
        """Return all specs that share the module of `spec`."""
        if not isinstance(spec, TiedLayerSpec):
            return [spec]
        return [other for other in self.layer_specs if isinstance(other, TiedLayerSpec) and other.key == spec.key]

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

    def forward(self, inputs: Activations, *, stage: int = 0, **options: Any) -> Activations:
        """Run the layers of a stage; see `forward_stage`. ZeRO-3 attaches its hooks to the call of a module."""
        return self.forward_stage(stage, inputs, **options)

    def forward_stage(
        self,
        stage: int,
        inputs: Activations,
        *,
        dropout_path: tuple[int, int] | None = None,
        split_backward: bool = False,
    ) -> Activations:
        """Run the layers of a stage on one micro-batch.

        Args:
            stage: a stage of this rank.
            inputs: outputs of the previous stage, or on the first stage the inputs of the micro-batch.
            dropout_path: the step and the index of the micro-batch in the global batch; together with a layer's index
                they seed the layer's random numbers. None uses the current state of the generators.
            split_backward: whether the backward may defer the weight gradients of linear layers.
        """
        layers = self.layers_of(stage)
        interval = self.activation_checkpointing if torch.is_grad_enabled() else 0
        self._kept_inputs.begin()
        for start in range(layers.start, layers.stop, interval or len(layers)):
            chosen = range(start, min(start + (interval or len(layers)), layers.stop))
            run = partial(self._run_layers, chosen, dropout_path, split_backward)
            if interval and self._is_checkpointable(chosen):
                if start in self._changing_inputs:
                    run = partial(_run_on_copies, run)
                inputs = self._kept_inputs.run(
                    run,
                    inputs,
                    is_shard=start > 0 and self.returns_shard(start - 1),
                    is_held=start == layers.start,
                    # The seeds are set again inside the recomputation.
                    preserve_rng_state=dropout_path is None,
                )
            else:
                inputs = run(inputs)
        return inputs

    @cached_property
    def _changing_inputs(self) -> frozenset[int]:
        """Layers that may change their input in place, as `nn.ReLU(inplace=True)` does, though it is kept."""
        return frozenset(
            layer_idx
            for layer_idx in self._layers
            if any(getattr(part, "inplace", False) is True for part in self.module_of(layer_idx).modules())
        )

    def _is_checkpointable(self, layers: range) -> bool:
        names = self.checkpointable_layers
        if not any(self._recomputed[layer_idx] for layer_idx in layers):
            return False
        return names is None or all(type(self.module_of(layer_idx)).__name__ in names for layer_idx in layers)

    def _run_layers(
        self, layers: range, dropout_path: tuple[int, int] | None, split_backward: bool, inputs: Activations
    ) -> Activations:
        with self._split_linear() if split_backward else nullcontext():
            for layer_idx in layers:
                if dropout_path is not None:
                    self._seed(fold_seed(self.seed, "layer", *dropout_path, layer_idx))
                inputs = self._as_taken(inputs, layer_idx)
                if self._keeps(layer_idx, dropout_path):
                    try:
                        inputs = self._layers[layer_idx](inputs)
                    except Exception as error:
                        _name_layer(error, f"layer {self.layer_names[layer_idx]!r}")
                        raise
                else:
                    inputs = map_tensors(partial(_reaching_back, self.module_of(layer_idx)), inputs)
                if self.observe_layer is not None:
                    self.observe_layer(layer_idx, inputs, dropout_path)
            if layer_idx == len(self.layer_specs) - 1:
                inputs = convert(
                    inputs, is_shard=self.returns_shard(layer_idx), wants_shard=False, group=self.tensor_group
                )
        return inputs

    def _keeps(self, layer_idx: int, dropout_path: tuple[int, int] | None) -> bool:
        """Scale what a layer adds to its input for one micro-batch; False if the layer is left out."""
        if layer_idx not in self._blocks or self.layer_drop is None:
            return True
        scale: float | None = 1.0
        if dropout_path is not None:
            step, micro_batch = dropout_path
            num_blocks = max(self._blocks.values())
            scale = self.layer_drop.draw_scale(
                self._blocks[layer_idx], num_blocks, seed=self.seed, step=step, micro_batch=micro_batch
            )
        if scale is not None:
            self.module_of(layer_idx).residual_scale = scale  # type: ignore[assignment]
        return scale is not None

    def returns_shard(self, layer_idx: int) -> bool:
        """True if a layer of this rank returns a shard of the sequence."""
        return self._flows[layer_idx].returns_shard

    def _as_taken(self, inputs: Activations, layer_idx: int) -> Activations:
        """Convert the outputs of one layer to what the next takes: the whole sequence, or this rank's shard of it."""
        is_shard = layer_idx > 0 and self.returns_shard(layer_idx - 1)
        wants_shard = self._flows[layer_idx].takes_shard
        return convert(inputs, is_shard=is_shard, wants_shard=wants_shard, group=self.tensor_group)

    def stage_parameters(self, stage: int) -> list[nn.Parameter]:
        """Return the trainable parameters of a stage of this rank."""
        modules = (self.module_of(layer_idx) for layer_idx in self.layers_of(stage))
        parameters = (parameter for module in modules for parameter in module.parameters() if parameter.requires_grad)
        return list(dict.fromkeys(parameters))

    def module_of(self, layer_idx: int) -> nn.Module:
        """Return the module of a layer of this rank."""
        spec = self.layer_specs[layer_idx]
        if isinstance(spec, TiedLayerSpec):
            return self.tied_modules[spec.key]
        module: nn.Module = self.get_submodule(str(layer_idx))
        return module

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Tied parameters that are trained on several ranks, and the process group of each."""
        tied = super().get_tied_weights_and_groups()
        return [(weight, group) for weight, group in tied if weight.requires_grad]

    def named_logical_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield `(logical name, parameter, owned)` for each parameter of this rank.

        Several ranks may hold a tied parameter under one name; the rank with its first layer owns it.
        """
        for name, tensor, owned in self._named_logical(nn.Module.named_parameters):
            assert isinstance(tensor, nn.Parameter)
            yield name, tensor, owned

    def named_logical_buffers(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield `(logical name, buffer, owned)` for each persistent buffer of this rank."""
        yield from self._named_logical(persistent_buffers)

    def description(self) -> dict[str, Any]:
        """Name and type of each layer, for the configuration in a checkpoint."""
        names = zip(self.layer_names, self.layer_specs, strict=True)
        return {"layers": [{"name": name, "type": spec.type_name} for name, spec in names]}

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
            for name, tensor in named(self.module_of(layer_idx)):
                yield f"{layer_name}.{name}", tensor, owned


def _run_on_copies(run: Callable[[Any], Any], inputs: Any) -> Any:
    return run(map_tensors(Tensor.clone, inputs))


def _name_layer(error: Exception, layer: str) -> None:
    """Let the message of an error in a layer's forward begin with the layer."""
    if not isinstance(error, PipekitError) and error.args == (str(error),):
        error.args = (f"{layer}: {error}",)


def _reaching_back(left_out: nn.Module, passed: Tensor) -> Tensor:
    """Let gradients reach what a layer that is left out passes on, as they would through its weights."""
    if passed.requires_grad or not torch.is_grad_enabled() or not passed.is_floating_point():
        return passed
    if not any(parameter.requires_grad for parameter in left_out.parameters()):
        return passed
    # Whether a stage's output has a gradient must not differ between micro-batches.
    return passed.detach().requires_grad_()


def _seed_generators(seed: int) -> None:
    # torch.manual_seed would also note the call for every GPU that is not in use yet, which takes a millisecond.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
