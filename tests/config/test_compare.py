"""Settings that may change from one start of a run to the next, and those that may not."""

from __future__ import annotations

from typing import Any

import pytest

from pipekit.config import conflicting_keys, parse_config

SAVED = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 300}})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel.pp": 2, "parallel.partition": "uniform", "parallel.zero": 0},
        {
            "train.steps": 600,
            "train.global_batch_size": 16,
            "train.micro_batch_size": 2,
            "train.precision": "fp32",
        },
        {"optimizer.lr": 1.0, "scheduler.type": "linear"},
        {"run.dir": "x", "logging.wandb": True, "checkpoint.keep": None, "data.cache_dir": "/tmp/x"},
        {"model.vocab_size": 4000},
        {"data.source": ["python-stdlib"]},
        {"data.workers": 2, "data.validation": "held-out.txt"},
    ],
)
def test_layout_and_optimizer_may_change_within_a_run(changes: dict[str, Any]):
    assert conflicting_keys(SAVED, SAVED.updated(changes)) == []
    assert conflicting_keys(SAVED.updated(changes), SAVED) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_layers", 5),
        ("model.dropout", 0.1),
        ("model.tied_embedding", False),
        ("data.source", "other.txt"),
        ("data.source", "python-stdlib#5"),
        ("data.vocab_size", 300),
        ("data.shuffle", False),
        ("data.validation_fraction", 0.1),
        ("data.max_bytes", 10),
        ("train.sequence_length", 64),
        ("train.seed", 7),
    ],
)
def test_a_change_of_model_or_data_is_another_run(key: str, value: object):
    assert conflicting_keys(SAVED, SAVED.updated({key: value})) == [key]


def test_sources_and_weights_of_a_mixture_may_change_and_it_is_no_plain_source():
    entries = [{"name": "web", "source": "data/web"}, {"name": "code", "source": "data/code", "epochs": 2}]
    mixture = SAVED.updated({"data.mixture": entries})
    other = SAVED.updated({"data.mixture": [{"name": "math", "source": "data/math#5"}, {**entries[0], "weight": 0.5}]})
    staged = mixture.updated({"data.stages": [{"after_step": 5, "weights": {"code": 1}}]})
    assert conflicting_keys(mixture, other) == conflicting_keys(mixture, staged) == []
    assert conflicting_keys(SAVED, mixture) == conflicting_keys(mixture, SAVED) == ["data.source"]


def test_two_numbers_of_tokens_conflict():
    one, two = (SAVED.updated({"model.vocab_size": size}) for size in (100, 200))
    assert conflicting_keys(one, two) == ["model.vocab_size"]


def test_only_the_sizes_of_a_preset_matter():
    sizes = {key: value for key, value in SAVED.model.model_dump().items() if key != "preset"}
    assert conflicting_keys(SAVED, parse_config({"model": sizes, "train": {"steps": 3}})) == []
    assert "model.hidden_size" in conflicting_keys(SAVED, SAVED.updated({"model.preset": "mini"}))


def test_another_kind_of_model_is_another_run():
    own = parse_config({"model": "a.b:c", "train": {"steps": 300}})
    assert {"model.builder", "model.hidden_size"} <= set(conflicting_keys(SAVED, own))
