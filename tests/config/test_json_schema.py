"""The JSON schema accepts what loads and refuses what does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipekit.config import config_json_schema, parse_config
from pipekit.errors import ConfigError
from pipekit.models import find_families

SCHEMA = config_json_schema()
TYPES = {"object": dict, "array": (list, tuple), "string": str, "null": type(None), "boolean": bool}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Validate against the part of JSON Schema that the schema uses; any other keyword fails the test."""
    if "$ref" in schema:
        return accepts(SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], value)
    notes = {"title", "description", "default", "examples", "$schema", "$defs", "pattern"}
    checks = {
        "anyOf": lambda options: any(accepts(option, value) for option in options),
        "oneOf": lambda options: sum(accepts(option, value) for option in options) == 1,
        "type": lambda names: any(is_type(value, name) for name in ([names] if isinstance(names, str) else names)),
        "enum": lambda choices: value in choices,
        "const": lambda choice: value == choice,
        "minimum": lambda bound: not is_type(value, "number") or value >= bound,
        "maximum": lambda bound: not is_type(value, "number") or value <= bound,
        "exclusiveMinimum": lambda bound: not is_type(value, "number") or value > bound,
        "exclusiveMaximum": lambda bound: not is_type(value, "number") or value < bound,
        "minLength": lambda length: not isinstance(value, str) or len(value) >= length,
        "minProperties": lambda number: not isinstance(value, dict) or len(value) >= number,
        "minItems": lambda length: not isinstance(value, (list, tuple)) or len(value) >= length,
        "maxItems": lambda length: not isinstance(value, (list, tuple)) or len(value) <= length,
        "required": lambda keys: not isinstance(value, dict) or set(keys) <= set(value),
        "properties": lambda known: (
            not isinstance(value, dict) or all(accepts(known[key], item) for key, item in value.items() if key in known)
        ),
        "additionalProperties": lambda allowed: (
            not isinstance(value, dict)
            or allowed is True
            or all(
                key in schema.get("properties", {}) or (isinstance(allowed, dict) and accepts(allowed, item))
                for key, item in value.items()
            )
        ),
        "items": lambda item: not isinstance(value, (list, tuple)) or all(accepts(item, entry) for entry in value),
        "prefixItems": lambda items: (
            not isinstance(value, (list, tuple))
            or all(accepts(item, entry) for item, entry in zip(items, value, strict=False))
        ),
    }
    return all(checks[keyword](rule) for keyword, rule in schema.items() if keyword not in notes)


def is_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        kinds = int if name == "integer" else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, TYPES[name])


BASE: dict[str, Any] = {"model": {"preset": "tiny"}, "train": {"steps": 3}}


@pytest.mark.parametrize(
    "values",
    [
        BASE,
        {**BASE, "model": "my.module:build"},
        {**BASE, "model": {"builder": "a:b", "args": {"x": [1]}}},
        {
            **BASE,
            "model": {
                "hidden_size": 8,
                "num_layers": 1,
                "num_heads": 1,
                "max_positions": 128,
                "ffn_size": None,
            },
        },
        {**BASE, "logging": {"wandb": True}},
        {**BASE, "logging": {"wandb": {"project": "p"}}},
        {**BASE, "data": {"source": ["a", "b"], "validation_fraction": 0}},
        {**BASE, "parallel": {"dp": 2, "pp": 2, "partition": "manual", "boundaries": [0, 6, 12]}},
        {
            **BASE,
            "deepspeed": {
                "zero_optimization": {"overlap_comm": True},
                "data_types": {"grad_accum_dtype": "fp32"},
                "prescale_gradients": False,
                "train_batch_size": 16,
            },
        },
    ],
)
def test_the_schema_accepts_configurations_that_load(values: dict[str, Any]):
    config = parse_config(values)
    assert accepts(SCHEMA, values)
    assert accepts(SCHEMA, yaml.safe_load(config.to_yaml()))


def test_the_schema_accepts_a_model_that_its_folder_describes(tmp_path: Path):
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "max_positions": 128, "vocab_size": 50}
    llama = find_families()["llama"](**sizes)
    (tmp_path / "config.json").write_text(json.dumps(llama.hf_config(end_token_id=0, dtype="float32")))
    auto = f"family: auto, init_from: {tmp_path}"
    for model in (auto, f"{auto}, vocab_size: 64, dropout: 0.1, rms_norm_eps: 1.0e-6"):
        values = yaml.safe_load(f"model: {{{model}}}\ntrain: {{steps: 3}}")
        config = parse_config(values)
        assert accepts(SCHEMA, values)
        assert accepts(SCHEMA, yaml.safe_load(config.to_yaml()))
    for wrong in ("family: auto", f"{auto}, hiden_size: 8", f"{auto}, vocab_size: 0"):
        values = yaml.safe_load(f"model: {{{wrong}}}\ntrain: {{steps: 3}}")
        with pytest.raises(ConfigError):
            parse_config(values)
        assert not accepts(SCHEMA, values)


@pytest.mark.parametrize(
    "values",
    [
        {"train": {"steps": 3}},
        {**BASE, "zzz": 1},
        {**BASE, "train": {"setps": 3, "steps": 3}},
        {**BASE, "train": {"steps": 0}},
        {**BASE, "train": {"steps": "3"}},
        {**BASE, "train": {}},
        {**BASE, "model": {"preset": "huge"}},
        {**BASE, "model": 5},
        {**BASE, "optimizer": {"betas": [0.9]}},
        {**BASE, "optimizer": {"lr": 0}},
        {**BASE, "parallel": {"dp": "many"}},
        {**BASE, "parallel": {"zero": 4}},
        {**BASE, "data": {"validation_fraction": 1}},
        {**BASE, "data": {"source": []}},
        {**BASE, "logging": {"wandb": {"projct": "x"}}},
        {**BASE, "deepspeed": {"prescale_gradients": True}},
        {**BASE, "deepspeed": {"zero_optimization": {"offload_param": {"max_in_cpu": 1}}}},
        {**BASE, "deepspeed": {"zero_optimization": {"overlap_com": True}}},
    ],
)
def test_the_schema_refuses_configurations_that_do_not_load(values: dict[str, Any]):
    with pytest.raises(ConfigError):
        parse_config(values)
    assert not accepts(SCHEMA, values)


def test_the_schema_is_json_and_describes_every_section():
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["title"] == "pipekit configuration"
    assert SCHEMA["additionalProperties"] is False
    for section in SCHEMA["properties"].values():
        definition = SCHEMA["$defs"].get(section.get("$ref", "").removeprefix("#/$defs/"), {})
        assert section.get("description") or definition.get("description")
