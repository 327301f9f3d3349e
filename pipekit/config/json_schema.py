"""The JSON schema of a configuration file, for editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipekit.config.deepspeed_keys import DEEPSPEED_KEYS, TREATMENTS, KeyTree
from pipekit.config.schema import Config
from pipekit.models import find_families


def config_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, with the help text of every key as its description."""
    schema = Config.model_json_schema(mode="validation")
    model = schema["properties"]["model"]
    model.pop("discriminator", None)
    branches = [*model.pop("oneOf"), {"$ref": "#/$defs/AutoFamily"}]
    model["anyOf"] = [{"type": "string", "pattern": r"^[\w.]+:[\w.]+$"}, *branches]
    schema["$defs"]["AutoFamily"] = _auto_family(
        [schema["$defs"][family.__name__] for family in find_families().values()]
    )
    section = schema["properties"]["deepspeed"]
    section.pop("type"), section.pop("additionalProperties")
    section["anyOf"] = [{"type": "string", "minLength": 1}, _keys_schema(DEEPSPEED_KEYS, "")]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "pipekit configuration"}


def _auto_family(families: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Schema of a model whose folder tells its family and sizes; beside it may stand the settings of any family."""
    found: dict[str, list[dict[str, Any]]] = {}
    for family in families:
        for key, facts in family["properties"].items():
            # The folder's value is the default.
            choices, facts = (
                found.setdefault(key, []),
                {name: fact for name, fact in facts.items() if name != "default"},
            )
            choices += [] if facts in choices else [facts]
    settings = {key: choices[0] if len(choices) == 1 else {"anyOf": choices} for key, choices in found.items()}
    del settings["preset"]
    named = {
        "family": {"const": "auto", "description": "Take the family and the sizes from the folder `init_from`."},
        "init_from": {"type": "string", "minLength": 1, "description": settings["init_from"]["description"]},
    }
    return {
        "type": "object",
        "description": "A model of Hugging Face, by its folder.",
        "properties": {**settings, **named},
        "required": list(named),
        "additionalProperties": False,
    }


def _keys_schema(keys: KeyTree, prefix: str) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            key: _value_schema(f"{prefix}{key}") if below is None else _keys_schema(below, f"{prefix}{key}.")
            for key, below in keys.items()
            if not _is_always_refused(f"{prefix}{key}")
        },
    }


def _value_schema(path: str) -> dict[str, Any]:
    treatment = TREATMENTS[path]
    if "run" in treatment.callers:
        return {"enum": [*treatment.unless, "auto"]}
    return {"description": f"Value of {treatment.ours}."} if treatment.ours else {}


def _is_always_refused(path: str) -> bool:
    treatment = TREATMENTS.get(path)
    return treatment is not None and "run" in treatment.callers and not treatment.unless
