"""Candidates of a tuning run: configurations that differ in layout, schedule, micro-batches, ZeRO and checkpointing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from pipekit.config import Config
from pipekit.errors import ConfigError
from pipekit.predictions.prediction import Prediction
from pipekit.predictions.search import SearchResult
from pipekit.tune.search import Candidate

ZERO_STAGES = (0, 1, 2, 3)
"""ZeRO stages that are compared; a pipeline takes the first two."""

# What is written for one layout, and fits no other.
_OWN_KEYS: dict[str, Any] = {
    "parallel.auto": False,
    "parallel.partition": "flops",
    "parallel.boundaries": None,
    "parallel.stages_per_rank": None,
    "parallel.max_in_flight": None,
}


@dataclass(frozen=True)
class Choice:
    """A configuration that can be measured.

    Attributes:
        config: the configuration.
        changes: the keys that it changes in the user's.
        prediction: what the plan foresees.
    """

    config: Config
    changes: Mapping[str, Any]
    prediction: Prediction


def list_candidates(choices: Sequence[Choice]) -> list[Candidate]:
    """Candidates of the search, one for each choice.

    ZeRO 2 sends gradients in every micro-batch, where ZeRO 1 does so once a step, and ZeRO 3 sends weights as well. So
    each stands in for the stage below, for when memory is short.
    """
    index_of = {choice.prediction.plan: index for index, choice in enumerate(choices)}

    def candidate(prediction: Prediction) -> Candidate:
        plan = prediction.plan
        return Candidate(
            planned_s=prediction.step_time_s,
            memory_bytes=prediction.memory_bytes,
            properties={
                "pp": float(plan.layout.pp),
                "dp": float(plan.layout.dp),
                "tp": float(plan.layout.tp),
                "micro_batch_size": float(plan.micro_batch_size),
                "num_micro_batches": float(plan.num_micro_batches),
                "schedule": plan.schedule,
                "zero": 1.0 + plan.zero,
                "checkpointing": str(plan.checkpointing),
            },
            stands_in_for=index_of.get(replace(plan, zero=plan.zero - 1)) if plan.zero > 1 else None,
        )

    return [candidate(choice.prediction) for choice in choices]


def parse_fixed(config: Config, fixed: Sequence[str]) -> dict[str, Any]:
    """Values of the keys that are not to be tuned.

    Args:
        config: the user's configuration, whose value a key alone keeps.
        fixed: keys, such as `parallel.zero`, or keys with a value, such as `parallel.tp=1`.

    Raises:
        ConfigError: if a key is not tuned, or takes no such value.
    """
    known = [
        *(f"parallel.{name}" for name in ("pp", "dp", "tp", "zero", "schedule")),
        *(f"train.{name}" for name in ("micro_batch_size", "activation_checkpointing")),
    ]
    values: dict[str, Any] = {}
    for text in fixed:
        key, has_value, value = text.partition("=")
        if key not in known:
            raise ConfigError(f"--fix {text}: is not tuned; the keys that are tuned are {', '.join(known)}")
        section, _, name = key.partition(".")
        if has_value:
            try:
                values[key] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ConfigError(f"--fix {text}: {value!r} is not a value; try --fix {key} to keep yours") from None
        else:
            values[key] = getattr(getattr(config, section), name)
            if name == "activation_checkpointing":
                values[key] = values[key] is not None and values[key].written()
            if values[key] in ("auto", None):
                raise ConfigError(f"--fix {key}: the configuration leaves {key} open; give a value: --fix {key}=1")
    return values


def list_choices(config: Config, found: SearchResult, fixed: Mapping[str, Any]) -> tuple[list[Choice], int]:
    """Configurations to choose from, the one that is planned to be fastest first.

    Args:
        config: the user's.
        found: the layouts that fit by the plan.
        fixed: values of keys that are not to be tuned.

    Returns:
        The choices, and the number of layouts that a rule of the configuration refuses.

    Raises:
        ConfigError: if nothing is left.
    """
    choices, refusals = [], list[str]()
    allowed = [
        (prediction, keys)
        # ZeRO 2 and 3 send more messages than 1, which the plan may take for hidden.
        for prediction in sorted(found.ranked, key=lambda each: (each.step_time_s, each.plan.zero))
        for keys in [prediction.plan.written()]
        if all(keys[key] == value for key, value in fixed.items())
    ]
    if not allowed:
        shown = " ".join(f"--fix {key}={value}" for key, value in fixed.items())
        raise ConfigError(f"{shown}: none of the {len(found.ranked)} layouts that fit has these values; fix fewer keys")
    for prediction, keys in allowed:
        try:
            choices.append(Choice(config.updated({**_OWN_KEYS, **keys}), keys, prediction))
        except ConfigError as error:
            refusals.append(str(error))
    if not choices:
        raise ConfigError(f"a rule of the configuration refuses every layout; the first because {refusals[0]}")
    return choices, len(refusals)
