"""Curriculum learning and progressive layer drop as DeepSpeed's JSON has them, and pipekit's keys for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from pipekit.settings.base import Fault

# The difficulty is the length to which sequences are cut; other metrics order the samples.
_TRUNCATING = ("seqlen", "seqlen_truncate")
_SAMPLING = "data_efficiency.data_sampling"
_TYPES = {"fixed_linear": "linear", "fixed_root": "root", "fixed_discrete": "discrete"}
_SCHEDULE_KEYS = {"total_curriculum_step", "difficulty_step", "root_degree", "difficulty", "max_step"}
_TOP_KEYS = ("min_difficulty", "max_difficulty")


def growth_settings(section: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield the settings of pipekit's that stand for a curriculum or a layer drop: key, value, and DeepSpeed's key."""
    for key, curriculum in _curricula(section):
        if set(curriculum.get("schedule_config") or {}) <= _SCHEDULE_KEYS and curriculum.get("schedule_type") in _TYPES:
            yield "train.curriculum", _translated(curriculum), key
    drop = section.get("progressive_layer_drop")
    if _is_on(drop):
        given = {key: drop.get(key, default) for key, default in {"theta": 1.0, "gamma": 0.001}.items()}
        yield "train.layer_drop", given, "progressive_layer_drop"


def _translated(curriculum: Mapping[str, Any]) -> dict[str, Any]:
    kind = _TYPES[curriculum["schedule_type"]]
    # Of a list of lengths, the first and the last say the same.
    ends = () if kind == "discrete" else _TOP_KEYS
    given = {key: curriculum[key] for key in ends if key in curriculum}
    return {"type": kind, **given, **(curriculum.get("schedule_config") or {})}


def growth_faults(section: Mapping[str, Any], owner: str) -> Iterator[Fault]:
    """Yield the faults of a curriculum or a layer drop that a run cannot have."""
    efficiency = section.get("data_efficiency")
    if _is_on(efficiency):
        if _is_on(efficiency.get("data_routing")):
            yield _fault(owner, "data_efficiency.data_routing", "random layer token drop is not available; remove it")
        sampling = efficiency.get("data_sampling") or {}
        for name in _metrics(sampling):
            if name not in _TRUNCATING:
                yield _fault(
                    owner,
                    f"{_SAMPLING}.curriculum_learning.curriculum_metrics.{name}",
                    f"a curriculum is one of sequence lengths, whose metric is {_TRUNCATING[0]}; remove it",
                )
    curricula = list(_curricula(section))
    if len(curricula) > 1:
        yield _fault(owner, curricula[1][0], f"{owner}{curricula[0][0]} gives a curriculum, too; remove one of them")
    for key, curriculum in curricula:
        if curriculum.get("curriculum_type", "seqlen") != "seqlen":
            yield _fault(owner, f"{key}.curriculum_type", "must be seqlen, the length of sequences")
        if curriculum.get("difficulty_type", "value") != "value":
            yield _fault(owner, f"{key}.difficulty_type", "must be value, a number of tokens")
        if curriculum.get("schedule_type") not in _TYPES:
            yield _fault(owner, f"{key}.schedule_type", f"must be {', '.join(_TYPES)}; for example fixed_linear")
        schedule = curriculum.get("schedule_config") or {}
        for unknown in sorted(set(schedule) - _SCHEDULE_KEYS):
            yield _fault(owner, f"{key}.schedule_config.{unknown}", "unknown key; remove it")
        lengths = schedule.get("difficulty") if curriculum.get("schedule_type") == "fixed_discrete" else None
        for end, place in {"min_difficulty": 0, "max_difficulty": -1}.items():
            if lengths and curriculum.get(end, lengths[place]) != lengths[place]:
                yield _fault(owner, f"{key}.{end}", f"must be {lengths[place]}, as schedule_config.difficulty has it")


def _curricula(section: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each curriculum of sequence lengths that is switched on, after its key."""
    if _is_on(section.get("curriculum_learning")):
        yield "curriculum_learning", section["curriculum_learning"]
    efficiency = section.get("data_efficiency")
    if _is_on(efficiency):
        for name, metric in _metrics(efficiency.get("data_sampling") or {}).items():
            if name in _TRUNCATING:
                yield f"{_SAMPLING}.curriculum_learning.curriculum_metrics.{name}", metric


def _metrics(sampling: Mapping[str, Any]) -> Mapping[str, Any]:
    learning = sampling.get("curriculum_learning")
    return (learning.get("curriculum_metrics") or {}) if _is_on(sampling) and _is_on(learning) else {}


def _is_on(section: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(section, Mapping) and section.get("enabled", False) is True


def _fault(owner: str, key: str, rule: str) -> Fault:
    return Fault(("deepspeed", *key.split(".")), f"{owner}{key}: {rule}")
