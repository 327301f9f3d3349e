"""Rules between the keys of the `data` section, and between it and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from pipekit.settings.base import Fault, alternatives, rule_fault, show
from pipekit.settings.suggest import closest

if TYPE_CHECKING:
    from pipekit.config.data_config import DataConfig, Weight
    from pipekit.config.schema import TrainConfig


def mixture_fits(data: DataConfig) -> Iterator[Fault]:
    """A mixture stands in place of a source, names each of its sources once, and reads at least one."""
    if data.mixture is None:
        return
    for key in ("source", "validation"):
        if getattr(data, key) != type(data).model_fields[key].default:
            yield rule_fault(
                f"data.{key} data.mixture",
                f"data.{key}={show(getattr(data, key))} does not go with data.mixture, whose entries have a {key} "
                "each; remove one of them",
            )
    seen: dict[str, int] = {}
    for index, entry in enumerate(data.mixture):
        first = seen.setdefault(entry.name, index)
        if first != index:
            yield rule_fault(
                f"data.mixture.{index}.name",
                f"data.mixture.{index}.name={entry.name} is the name of data.mixture.{first}, too; rename one of them",
            )
        filled_in = data.entries[index]
        if entry.limit is not None and filled_in.source != entry.source:
            yield rule_fault(
                f"data.mixture.{index}.limit",
                f"data.mixture.{index}.limit={entry.limit}: data.mixture.{index}.source={show(entry.source)} has a "
                "limit already; remove one of them",
            )
    yield from _weights_fit({entry.name: entry.weight for entry in data.mixture}, "data.mixture")


def stages_fit(data: DataConfig) -> Iterator[Fault]:
    """Stages follow each other, and name sources of the mixture."""
    if data.stages and data.mixture is None:
        yield rule_fault("data.stages", "data.stages change the weights of data.mixture, which is not given; give it")
        return
    names = [entry.name for entry in data.mixture or ()]
    for (index, before), after in zip(enumerate(data.stages, 1), data.stages[1:], strict=False):
        if after.after_step <= before.after_step:
            yield rule_fault(
                f"data.stages.{index}.after_step",
                f"data.stages.{index}.after_step={after.after_step} must be more than that of the stage before, "
                f"{before.after_step}; write the stages in their order",
            )
    for index, stage in enumerate(data.stages):
        key = f"data.stages.{index}.weights"
        for name in stage.weights:
            if name not in names:
                near = closest(name, names)
                hint = f"did you mean {near}?" if near else f"the sources are {alternatives(names, last='and')}"
                yield rule_fault(key, f"{key}: data.mixture has no source named {show(name)}; {hint}")
        yield from _weights_fit(stage.weights, key)


def _weights_fit(weights: Mapping[str, Weight], key: str) -> Iterator[Fault]:
    numbers = [weight for weight in weights.values() if weight != "auto"]
    if len(numbers) == len(weights) and not any(numbers):
        yield rule_fault(key, f"{key}: every weight is 0; give at least one source a weight above 0")
    elif len(numbers) < len(weights) and sum(numbers) >= 1:
        yield rule_fault(
            key,
            f"{key}: weights of auto share what the numbers leave of 1, and these sum to {sum(numbers):g}; lower the "
            "numbers, or replace each auto by a number",
        )


def evaluation_has_text(train: TrainConfig, data: DataConfig) -> Iterator[Fault]:
    """Evaluation reads text that is held out."""
    has_own = any(entry.validation is not None for entry in data.entries)
    if train.eval_interval is not None and data.validation_fraction == 0 and not has_own:
        yield rule_fault(
            "train.eval_interval data.validation_fraction",
            f"train.eval_interval={train.eval_interval} needs text to evaluate on, and data.validation_fraction=0 "
            "holds none out; try data.validation_fraction=0.05, or train.eval_interval=null",
        )


DATA_RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Fault]]], ...] = (
    (("data",), mixture_fits),
    (("data",), stages_fit),
    (("train", "data"), evaluation_has_text),
)
