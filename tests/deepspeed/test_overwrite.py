from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekit import overwrite_deepspeed_config
from pipekit.errors import ConfigError

BASE: dict[str, Any] = {
    "train_batch_size": 8,
    "betas": [0.9, 0.95],
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "eps": 1e-8}},
    "zero_optimization": {"stage": 1, "offload_optimizer": None},
}

SECTIONS = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda below: st.dictionaries(st.sampled_from("abc"), below, min_size=1, max_size=3),
    max_leaves=12,
)
CONFIGS = st.dictionaries(st.sampled_from("abc"), SECTIONS, max_size=3)


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(value, dict):
        return {path: value}
    found: dict[tuple[str, ...], Any] = {}
    for key, below in value.items():
        found |= leaves(below, (*path, key))
    return found


@given(base=CONFIGS, overrides=CONFIGS, allow_new=st.booleans())
def test_leaves_take_the_place_of_leaves(base: dict[str, Any], overrides: dict[str, Any], allow_new: bool) -> None:
    old, new = leaves(base), leaves(overrides)
    # A path that goes on from the end of another: a section meets a value.
    meets = any(one != other and one == other[: len(one)] for pair in ((old, new), (new, old))
                for one in pair[0] for other in pair[1] if one)  # fmt: skip
    before = copy.deepcopy((base, overrides))
    if meets or (not allow_new and not set(new) - {()} <= set(old)):
        with pytest.raises(ConfigError):
            overwrite_deepspeed_config(base, overrides, allow_new=allow_new)
    else:
        result = overwrite_deepspeed_config(base, overrides, allow_new=allow_new)
        assert {path: leaf for path, leaf in leaves(result).items() if path} == {
            path: leaf for path, leaf in {**old, **new}.items() if path
        }
    assert (base, overrides) == before


def test_the_base_may_be_a_file_and_the_result_shares_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(BASE))
    overrides = {"betas": [0.8], "optimizer": {"params": {"lr": 0.2}}, "zero_optimization": {"stage": 3}}
    for base in (BASE, path, str(path)):
        result = overwrite_deepspeed_config(base, overrides)
        assert result["optimizer"] == {"type": "AdamW", "params": {"lr": 0.2, "eps": 1e-8}}
        assert result["zero_optimization"] == {"stage": 3, "offload_optimizer": None}
        result["betas"].append(1)
        result["optimizer"]["type"] = "Adam"
    assert overrides["betas"] == [0.8]
    assert BASE["optimizer"]["type"] == "AdamW"


def test_none_and_a_section_may_take_each_others_place() -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert overwrite_deepspeed_config(BASE, offload)["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert overwrite_deepspeed_config(BASE, {"optimizer": None})["optimizer"] is None


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"train_batchsize": 4}, "train_batchsize: the base has no such key; did you mean 'train_batch_size'?"),
        ({"zero_optimization": {"stge": 3}}, "did you mean 'zero_optimization.stage'? allow_new=True adds it"),
        ({"lr": 3}, "lr: the base has no such key; did you mean 'optimizer.params.lr'?"),
        ({"fp16": {"enabled": True}}, "fp16: the base has no such key; allow_new=True adds it"),
        ({"optimizer": "Adam"}, "optimizer=Adam: must be a mapping, since the base has a section of that name"),
        ({"train_batch_size": {"x": 1}}, "train_batch_size: must be a value, not a section, since the base has"),
        ({"a": 1, "b": {"c": 1}}, "2 mistakes in the configuration:\n  a: the base has no such key"),
        ([1], "overrides=[1]: must be a mapping"),
    ],
)
def test_mistakes_are_refused(overrides: Any, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        overwrite_deepspeed_config(BASE, overrides)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is given twice, as 1 and 2; remove one of them"),
        ("[1]", "must be a mapping, and is list"),
        ("{", "cannot be read as a DeepSpeed configuration"),
        ('{"stage": 1}', "stag: {path} has no such key; did you mean 'stage'?"),
    ],
)
def test_a_files_faults_are_shown_with_its_path(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        overwrite_deepspeed_config(path, {"stag": 1})
    assert what.format(path=path) in str(caught.value)
    assert str(path) in str(caught.value)
