"""The JSON schema of a configuration file, for editors."""

from __future__ import annotations

from typing import Any

from pipekit.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS, UNSUPPORTED_KEYS, KeyTree
from pipekit.config.schema import Config


def config_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, with the help text of every key as its description."""
    schema = Config.model_json_schema(mode="validation")
    model = schema["properties"]["model"]
    model.pop("discriminator", None)
    branches = model.pop("oneOf")
    model["anyOf"] = [{"type": "string", "pattern": r"^[\w.]+:[\w.]+$"}, *branches]
    schema["properties"]["deepspeed"] |= _keys_schema(DEEPSPEED_KEYS, "")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "pipekit configuration"}


def _keys_schema(keys: KeyTree, prefix: str) -> dict[str, Any]:
    refused = {*OWNED_KEYS, *UNSUPPORTED_KEYS}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            key: {} if below is None else _keys_schema(below, f"{prefix}{key}.")
            for key, below in keys.items()
            if f"{prefix}{key}" not in refused
        },
    }
