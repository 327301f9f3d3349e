"""What the partitioners are told of a planned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

from pipekit.partitioners import LayerFacts, MemoryLimit
from pipekit.predictions.elements import Precision
from pipekit.predictions.layer_costs import layer_flops, layer_seconds
from pipekit.predictions.memory import recomputation_bytes
from pipekit.predictions.model_costs import ModelCosts, stage_extras
from pipekit.predictions.prediction import Choice, PlannedModel
from pipekit.predictions.rough import bytes_of_parameter
from pipekit.schedules import Schedule
from pipekit.schedules.messages import EARLY_RECEIVES

# From either side, and one gradient that is received and one that is sent.
_MESSAGES = 2 * EARLY_RECEIVES + 2


def layer_facts(
    model: PlannedModel,
    choice: Choice,
    schedule: Schedule,
    *,
    type_names: Sequence[str],
    limit_bytes: Callable[[], int],
) -> LayerFacts:
    """Return what the partitioners may know; what the layers cost is found out when one asks.

    Args:
        model: the model; where it is timed, seconds are known.
        choice: the layout.
        schedule: the table of a step.
        type_names: class name of each layer.
        limit_bytes: returns what a rank may hold.
    """

    def costs() -> ModelCosts:
        return model.costs_of(choice.micro_batch_size)

    def extras(method: str) -> list[float] | None:
        if method not in ("flops", "profile"):
            return None
        return stage_extras(costs(), schedule.num_stages, layer_flops if method == "flops" else layer_seconds)

    return LayerFacts(
        type_names,
        lambda: model.layer_parameters,
        count_flops=lambda: list(map(layer_flops, costs().layers)),
        measure_seconds=(lambda: list(map(layer_seconds, costs().layers))) if model.is_timed else None,
        stage_extras=extras,
        memory_limit=lambda: memory_limit(
            costs(),
            schedule,
            precision=model.precision,
            zero=choice.zero,
            dp=choice.layout.dp,
            checkpointing=choice.checkpointing,
            limit_bytes=limit_bytes(),
        ),
        layer_names=model.layer_names,
        placement=schedule.placement,
    )


def memory_limit(
    costs: ModelCosts,
    schedule: Schedule,
    *,
    precision: Precision,
    zero: int,
    dp: int,
    checkpointing: bool,
    limit_bytes: int,
) -> MemoryLimit:
    """Return what layers and stages hold, at most rather than exactly, and how much a rank may.

    Args:
        costs: of the model's layers for one micro-batch.
        schedule: the table of a step.
        precision: of weights and activations.
        zero: ZeRO stage.
        dp: replicas.
        checkpointing: whether only the inputs of layers are kept.
        limit_bytes: the most that a rank may hold.
    """
    per_parameter = bytes_of_parameter(precision, zero, dp)
    in_flight = schedule.peak_of_stages()
    largest_input = max(layer.input_bytes for layer in costs.layers)
    # What enters a stage is held for each micro-batch, and messages come ahead, from both sides at most.
    extras = [(number + _MESSAGES) * largest_input for number in in_flight]
    # What is recomputed for an input gradient stays until the weight gradient.
    is_recomputed = checkpointing and not schedule.split_backwards
    if checkpointing:
        recomputed = max(recomputation_bytes([layer]) for layer in costs.layers)
        extras = [extra + recomputed for extra in extras]
    if costs.loss is not None:
        extras[-1] += (in_flight[-1] + 2) * costs.loss.saved_bytes
    return MemoryLimit(
        state_bytes=[ceil(per_parameter * layer.parameters) for layer in costs.layers],
        activation_bytes=[
            layer.input_bytes if is_recomputed else layer.output_bytes + layer.saved_bytes for layer in costs.layers
        ],
        in_flight=in_flight,
        extra_bytes=extras,
        limit_bytes=limit_bytes,
    )
