"""The planned model of a configuration, for predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Literal

import torch

from pipekit.config import Config
from pipekit.costs.child import profile_in_child
from pipekit.costs.describe import describe_layers
from pipekit.costs.example import Example
from pipekit.costs.profiling import profile_layers
from pipekit.errors import ConfigError
from pipekit.layers.parameters import trained_and_frozen_shapes
from pipekit.layers.specs import LayerSpec, layer_names
from pipekit.optimizers.table import OPTIMIZERS
from pipekit.predictions.elements import Precision
from pipekit.predictions.layer_costs import ModelCosts
from pipekit.predictions.model_states import ADAM_STATES, OptimizerStates
from pipekit.predictions.prediction import PlannedModel
from pipekit.progress import ProgressCallback

ExampleBuilder = Callable[[int], Example | None]
"""Returns one micro-batch of so many sequences; None where a trial does not tell."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of weights and activations by the name of a precision."""


def describe_model(
    config: Config,
    specs: Sequence[LayerSpec],
    example: ExampleBuilder,
    *,
    precision: Precision,
    device: Literal["cpu", "cuda"],
    time_on: str | None = None,
    num_threads: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> PlannedModel:
    """Planned model of a configuration; its layers are described or timed when their costs are first asked for.

    Args:
        config: the configuration.
        specs: its layers.
        example: returns a micro-batch.
        precision: of weights and activations.
        device: kind of device; a CPU computes in the memory that others offload to.
        time_on: kind of device on which layers are timed; None counts their operations only.
        num_threads: CPU threads with which they are timed; those of this process unless given.
        on_progress: called with the layer that is being timed, and the fraction done.
    """

    @cache
    def costs_of(micro_batch_size: int) -> ModelCosts:
        given = example(micro_batch_size)
        if given is None:
            raise ConfigError(
                f"run.trial={config.run.trial}: the costs of its layers are not known, since it does not describe "
                "their inputs; define the class method example(config, micro_batch_size), which returns a "
                "pipekit.Example(inputs, labels), or set parallel.partition=parameters"
            )
        if time_on is None:
            return describe_layers(
                specs, given.inputs, dtype=DTYPES[precision], loss_fn=given.loss_fn, labels=given.labels
            )
        # A GPU's context and memory would stay with this process as long as it watches over the run.
        profile = profile_in_child if time_on == "cuda" else profile_layers
        with _threads(num_threads):
            return profile(
                specs,
                given.inputs,
                dtype=DTYPES[precision],
                device=time_on,
                loss_fn=given.loss_fn,
                labels=given.labels,
                tf32=config.train.tf32,
                on_progress=on_progress,
            )

    shapes_of = cache(partial(trained_and_frozen_shapes, specs))
    return PlannedModel(
        costs_of=costs_of,
        shapes_of=lambda tp: shapes_of(tp)[0],
        layer_names=layer_names(specs),
        sequence_length=config.train.sequence_length,
        precision=precision,
        optimizer_states=find_optimizer_states(config),
        offload=config.parallel.offload if device == "cuda" or config.parallel.offload == "nvme" else "none",
        frozen_shapes_of=lambda tp: shapes_of(tp)[1],
        is_timed=time_on is not None,
        tf32=config.train.tf32,
    )


def find_optimizer_states(config: Config) -> OptimizerStates:
    """Optimizer states of a run, with the moving average of the weights where it keeps one."""
    average, optimizer = int(config.train.ema is not None), config.optimizer
    kind = OPTIMIZERS.get(optimizer.type)
    if kind is None:  # one of the user's, which is taken for one such as Adam
        return replace(ADAM_STATES, per_parameter=ADAM_STATES.per_parameter + average)
    counted = kind.count_states({"momentum": optimizer.momentum, **optimizer.args})
    return OptimizerStates(per_parameter=counted + average, per_tensor=len(kind.tensor_states))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
