"""Results of predictions and partitions: tables for the terminal, the same as JSON, and their requirements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich.table import Table

from pipekit.predictions.layer_costs import LayerCosts
from pipekit.predictions.prediction import Prediction
from pipelines.profiled import ProfiledModel
from pipelines.requirements import Requirement
from pipelines.settings import Setting
from pipelines.turns import Contender, Result, Results, of_system

PREDICTION_ERROR = 0.15
"""Largest relative difference of a measured step from the predicted one."""
PROFILE_SPEEDUP = 1.15
"""Of our engine with `profile` over DeepSpeed with each of its partitions."""

Boundaries = Mapping[Contender, tuple[int, ...]]


@dataclass(frozen=True)
class Compared:
    """Prediction for a contender, and its measurement."""

    contender: Contender
    prediction: Prediction
    result: Result

    @property
    def error(self) -> float:
        """By which share the measured step is off the predicted one; positive where it is longer."""
        return self.result.step_s / self.prediction.step_time_s - 1


def check_predictions(setting: Setting, compared: Sequence[Compared]) -> Iterator[Requirement]:
    """Return what is asked of the predictions of a setting."""
    for one in compared:
        what = f"{one.contender.schedule}: measured off predicted"
        yield Requirement(f"{setting}", what, abs(one.error), PREDICTION_ERROR, at_least=False)


def check_partitions(setting: Setting, results: Results) -> Iterator[Requirement]:
    """Return what is asked of `profile`."""
    profile_s = _profile(results).step_s
    for peer, result in of_system(results, "DeepSpeed").items():
        what = f"profile: speed over {peer}"
        yield Requirement(f"{setting}", what, result.step_s / profile_s, PROFILE_SPEEDUP)


def prediction_table(setting: Setting, compared: Sequence[Compared]) -> Table:
    """Return a row for each schedule."""
    table = Table("schedule", "stages begin with", "compute", "update", "predicted", "measured", "", title=str(setting))
    for one in compared:
        times = one.prediction.times
        seconds = (times.compute_s, times.update_s, times.step_time_s, one.result.step_s)
        cells = [f"{value:.3f} s" for value in seconds]
        table.add_row(one.contender.schedule, _starts(one.contender.boundaries), *cells, f"{100 * one.error:+.1f} %")
    return table


def layer_table(setting: Setting, model: ProfiledModel) -> Table:
    """Return a row for each kind of layer, and one for the loss."""
    table = Table("layers", "", "parameters", "forward", "input gradient", "weight gradient", title=str(setting))
    everything: list[tuple[str, LayerCosts]] = list(zip(model.type_names, model.costs.layers, strict=True))
    if model.costs.loss is not None:
        everything.append(("loss", model.costs.loss))
    for (kind, costs), same in groupby(sorted(everything, key=everything.index)):
        seconds = (costs.forward_s, costs.input_gradient_s, costs.weight_gradient_s)
        cells = ["" if value is None else f"{1000 * value:.2f} ms" for value in seconds]
        table.add_row(str(len(list(same))), kind, f"{costs.parameters:,}", *cells)
    return table


def partition_table(setting: Setting, results: Results, boundaries: Boundaries) -> Table:
    """Return a row for each engine and partition."""
    table = Table("", "partition", "stages begin with", "step", "profile is faster by", "loss", title=str(setting))
    profile_s = _profile(results).step_s
    for contender, result in results.items():
        loss = "" if result.loss is None else f"{result.loss:.4f}"
        cells = [f"{result.step_s:.3f} s", f"{result.step_s / profile_s:.2f}x", loss]
        table.add_row(contender.system, contender.partition, _starts(boundaries[contender]), *cells)
    return table


def prediction_json(setting: Setting, compared: Sequence[Compared]) -> dict[str, Any]:
    """Return what was predicted and measured in a setting."""
    schedules = [
        {
            "schedule": one.contender.schedule,
            "boundaries": one.contender.boundaries,
            "predicted_s": one.prediction.step_time_s,
            "compute_s": one.prediction.times.compute_s,
            "reduction_s": one.prediction.times.reduction_s,
            "update_s": one.prediction.times.update_s,
            "measured_s": one.result.step_s,
            "error": one.error,
            **asdict(one.result),
        }
        for one in compared
    ]
    return {"setting": setting.name, "title": str(setting), "schedules": schedules}


def partition_json(setting: Setting, model: ProfiledModel, results: Results, boundaries: Boundaries) -> dict[str, Any]:
    """Return what each layer costs, and what each partition was measured at."""
    profile_s = _profile(results).step_s
    contenders = [
        {
            "system": contender.system,
            "partition": contender.partition,
            "boundaries": boundaries[contender],
            "step_s": result.step_s,
            "profile_speedup": result.step_s / profile_s,
            **asdict(result),
        }
        for contender, result in results.items()
    ]
    return {
        "setting": setting.name,
        "title": str(setting),
        "costs": asdict(model.costs),
        "layer_names": model.layer_names,
        "contenders": contenders,
    }


def _profile(results: Results) -> Result:
    (found,) = (result for contender, result in results.items() if contender.partition == "profile")
    return found


def _starts(boundaries: Sequence[int]) -> str:
    return " ".join(map(str, boundaries[:-1]))
