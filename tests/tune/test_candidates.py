"""Candidates of a tuning run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipekit.config import Config, load_config, parse_config
from pipekit.errors import ConfigError
from pipekit.plan.search import search
from pipekit.predictions.devices import find_device
from pipekit.predictions.search import SearchResult
from pipekit.training.language_model import LanguageModelTrial
from pipekit.tune.candidates import ZERO_STAGES, list_candidates, list_choices, parse_fixed
from train_runs import write_workspace


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_workspace(tmp_path) / "c.yaml", ["model.vocab_size=300"])


def plan(config: Config) -> SearchResult:
    specs = LanguageModelTrial.build_layers(config)
    options: dict[str, Any] = {"num_devices": 2, "device": find_device("cpu"), "is_gpu": False}
    return search(config, specs, LanguageModelTrial, **options, tp=[1, 2], zero=ZERO_STAGES, num_ranked=10_000)[1]


def test_candidates_share_the_batch_and_differ_in_what_is_tuned(config: Config) -> None:
    choices, _ = list_choices(config, plan(config), {})
    planned = [choice.prediction.step_time_s for choice in choices]
    assert planned == sorted(planned)
    assert len({tuple(choice.changes.values()) for choice in choices}) == len(choices)
    for choice, candidate in zip(choices, list_candidates(choices), strict=True):
        parallel, train = choice.config.parallel, choice.config.train
        assert parallel.pp * parallel.tp * int(parallel.dp) == 2
        assert train.global_batch_size == config.train.global_batch_size
        assert parallel.zero < 2 or parallel.pp == 1
        assert candidate.properties["zero"] == 1 + parallel.zero
    for key in ("pp", "dp", "tp", "zero", "schedule"):
        assert len({getattr(choice.config.parallel, key) for choice in choices}) > 1


def test_zero_2_and_3_stand_in_for_the_stage_below_in_the_same_layout(config: Config) -> None:
    choices, _ = list_choices(config, plan(config), {})
    found = set()
    for choice, candidate in zip(choices, list_candidates(choices), strict=True):
        chosen = choice.prediction.plan
        assert (candidate.stands_in_for is not None) == (chosen.zero > 1)
        if candidate.stands_in_for is not None:
            below = choices[candidate.stands_in_for].prediction.plan
            assert below == replace(chosen, zero=chosen.zero - 1)
            found.add(chosen.zero)
    assert found == {2, 3}
    # Where the stage below is no candidate, nothing stands in for it.
    only_two, _ = list_choices(config, plan(config), {"parallel.zero": 2})
    assert only_two
    assert all(candidate.stands_in_for is None for candidate in list_candidates(only_two))


def test_what_is_fixed_stays(config: Config) -> None:
    fixed = parse_fixed(config, ["parallel.pp", "train.activation_checkpointing=false"])
    assert fixed == {"parallel.pp": 2, "train.activation_checkpointing": False}
    choices, _ = list_choices(config, plan(config), fixed)
    assert {choice.config.parallel.pp for choice in choices} == {2}
    assert not any(choice.config.train.activation_checkpointing for choice in choices)


def test_what_no_layout_has_cannot_be_fixed(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"--fix parallel\.pp=3: none of the \d+ layouts that fit has these values"):
        list_choices(config, plan(config), parse_fixed(config, ["parallel.pp=3"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lr=1", r"--fix optimizer\.lr=1: is not tuned; the keys that are tuned are parallel\.pp, "),
        ("parallel.dp", r"the configuration leaves parallel\.dp open; give a value: --fix parallel\.dp=1"),
        ("parallel.tp=[", r"'\[' is not a value; try --fix parallel\.tp to keep yours"),
    ],
)
def test_a_wrong_fix_says_what_to_type(config: Config, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_fixed(config, [text])


def test_layouts_that_a_rule_refuses_are_counted(config: Config) -> None:
    found = plan(config)
    choices, num_refused = list_choices(config, found, {})
    assert len(choices) + num_refused == len(found.ranked)
    # A built-in model does not take tensor parallelism and ZeRO 3 together, and has none of these.
    assert not any(choice.config.parallel.zero == 3 and choice.config.parallel.tp > 1 for choice in choices)
    compiled = config.updated({"train.compile": True, "parallel.pp": 1})
    _, more = list_choices(compiled, found, {})
    assert more > num_refused


def test_what_was_written_for_another_layout_is_left_out(config: Config) -> None:
    names = len(LanguageModelTrial.build_layers(config))
    own = config.updated({"parallel.partition": "manual", "parallel.boundaries": [0, 2, names]})
    choices, _ = list_choices(own, plan(config), {})
    assert all(choice.config.parallel.boundaries is None for choice in choices)
    assert all(parse_config(choice.config.model_dump()) == choice.config for choice in choices[:3])
