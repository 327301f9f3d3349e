"""A prediction as plain data: the JSON of `pipekit plan --json`, from which its tables and page are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipekit.layout import DEFAULT_ORDER, Layout
from pipekit.partitioners import ComparedPartition
from pipekit.predictions.devices import Device
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.prediction import Prediction
from pipekit.predictions.search import OutOfMemory, SearchResult
from pipekit.settings.activations import read_setting

_KEPT = ("zero", "schedule", "stages_per_rank", "micro_batch_size", "num_micro_batches")
# A picture of more actions shows nothing.
_MOST_DRAWN = 6000


def report(
    prediction: Prediction,
    device: Device,
    layer_names: Sequence[str],
    search: SearchResult | None = None,
    partitions: Sequence[ComparedPartition] = (),
) -> dict[str, Any]:
    """Prediction as numbers, texts, lists and dicts.

    Args:
        prediction: of the run.
        device: the device of each rank.
        layer_names: logical name of each layer.
        search: the layouts that were compared with it, if any.
        partitions: other ways to cut the model into as many stages, if any.
    """
    times = prediction.times
    found: dict[str, Any] = {
        "parameters": prediction.num_parameters,
        "layout": plan_report(prediction.plan),
        "device": {
            "name": device.name,
            "memory_bytes": device.memory_bytes,
            "usable_bytes": device.usable_bytes,
            "source": device.source,
        },
        "boundaries": list(prediction.boundaries),
        "step_time_s": prediction.step_time_s,
        "compute_s": times.compute_s,
        "reduction_s": times.reduction_s,
        "update_s": times.update_s,
        "tokens_per_s": prediction.tokens_per_s,
        "tflops_per_device": prediction.tflops_per_device,
        "bubble_fraction": times.bubble_fraction,
        "stages": [
            {
                "rank": rank,
                "layers": [
                    [stage.start, stage.stop - 1, layer_names[stage.start], layer_names[stage.stop - 1]]
                    for stage in predicted.stages
                ],
                "parameters": predicted.parameters,
                "memory_bytes": {**vars(predicted.memory), "total": predicted.memory.total},
                "time_s": predicted.time_s,
            }
            for rank, predicted in enumerate(prediction.ranks)
        ],
    }
    if sum(map(len, times.timeline.spans)) <= _MOST_DRAWN:
        found["timeline"] = [
            [{"action": str(span.action), "start_s": span.start_s, "end_s": span.end_s} for span in spans]
            for spans in times.timeline.spans
        ]
    if partitions:
        found["partitions"] = [other._asdict() for other in partitions]
    if search is not None:
        found["layouts"] = [
            {
                "layout": plan_report(other.plan),
                "tokens_per_s": other.tokens_per_s,
                "step_time_s": other.step_time_s,
                "memory_bytes": other.memory_bytes,
                "bubble_fraction": other.times.bubble_fraction,
            }
            for other in search.ranked
        ]
        found["num_fitting"] = search.num_fitting
        found["num_open"] = search.num_open
        found["rejected"] = [
            {"layout": plan_report(plan), "reason": str(reason)}
            | ({"lacking_bytes": reason.lacking_bytes} if isinstance(reason, OutOfMemory) else {})
            for plan, reason in search.rejected
        ]
    return found


def plan_report(plan: ParallelPlan) -> dict[str, Any]:
    """Layout and options as plain data."""
    layout = plan.layout
    order = {} if layout.order == DEFAULT_ORDER else {"order": list(layout.order)}
    return {
        "pp": layout.pp,
        "tp": layout.tp,
        "dp": layout.dp,
        **order,
        **{name: getattr(plan, name) for name in _KEPT},
        "activation_checkpointing": plan.checkpointing is not None and plan.checkpointing.written(),
    }


def read_plan(layout: Mapping[str, Any]) -> ParallelPlan:
    """Layout and options from the plain data of `plan_report`, which leaves `max_in_flight` out."""
    return ParallelPlan(
        Layout(**{key: layout[key] for key in ("pp", "dp", "tp", "order") if key in layout}),
        checkpointing=read_setting(layout["activation_checkpointing"]),
        **{name: layout[name] for name in _KEPT},
    )
