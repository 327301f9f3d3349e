"""The setting of activation checkpointing: the layers that it chooses, and what does not go together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipekit.config import parse_config
from pipekit.errors import ConfigError
from pipekit.settings.activations import ActivationCheckpointing, read_setting

NAMES = ["embed", "blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp", "head"]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, NAMES),
        ({"every": 2}, ["embed", "blocks.0.mlp", "blocks.1.mlp"]),
        ({"every": 3}, ["embed", "blocks.1.attention"]),
        ({"layers": "blocks.*.mlp"}, ["blocks.0.mlp", "blocks.1.mlp"]),
        ({"layers": ["blocks.0.*", "head"]}, ["blocks.0.attention", "blocks.0.mlp", "head"]),
    ],
)
def test_layers_are_chosen_by_their_place_or_their_names(given: dict[str, Any], chosen: list[str]) -> None:
    picks = ActivationCheckpointing(**given).chosen(NAMES)
    assert [name for name, is_chosen in zip(NAMES, picks, strict=True) if is_chosen] == chosen


def test_a_pattern_that_names_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        ActivationCheckpointing(layers="blocks.0.attn").chosen(NAMES)
    assert str(raised.value) == (
        "train.activation_checkpointing.layers: 'blocks.0.attn' matches none of the model's 6 layers; "
        "try 'blocks.0.attention'"
    )


@pytest.mark.parametrize(
    ("written", "setting"),
    [
        (False, None),
        (True, ActivationCheckpointing()),
        ({"every": 2, "offload": True}, ActivationCheckpointing(every=2, offload=True)),
        ({"layers": ["blocks.*"]}, ActivationCheckpointing(layers="blocks.*")),
    ],
)
def test_a_configuration_reads_what_is_written(written: Any, setting: ActivationCheckpointing | None) -> None:
    config = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 3, "activation_checkpointing": written}})
    assert config.train.activation_checkpointing == setting == read_setting(written)
    assert (setting is not None and json.loads(json.dumps(setting.written()))) == written


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": 2, "layers": "blocks.*"}, "every=2 and layers=['blocks.*'] both choose layers; remove one of them"),
        ({"only": "attention", "offload": True}, "offload=true does not go with only=attention"),
        ({"only": "attention", "partition": True}, "remove partition or only"),
        ({"only": "mlp"}, "must be attention"),
        ({"every": 0}, "every=0: must be"),
        ({"layer": "blocks.*"}, "did you mean 'train.activation_checkpointing.layers'"),
        ("all", "must be true, false, or a mapping of every, layers, only, partition, offload"),
    ],
)
def test_what_does_not_go_together_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({"model": {"preset": "tiny"}, "train": {"steps": 3, "activation_checkpointing": given}})
    assert message in str(raised.value)
    assert "train.activation_checkpointing" in str(raised.value)


def test_a_setting_reads_as_a_few_words() -> None:
    assert str(ActivationCheckpointing()) == "checkpointing"
    assert str(ActivationCheckpointing(every=2, offload=True)) == "checkpointing every=2 offload"
    assert str(ActivationCheckpointing(layers=["a.*", "b"])) == "checkpointing layers=a.* b"
