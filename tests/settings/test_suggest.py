"""Suggestions for a mistyped key: its own section first, then the others."""

from __future__ import annotations

import pytest

from pipekit.config.load import section_keys
from pipekit.settings.base import alternatives, show
from pipekit.settings.suggest import SYNONYMS, closest, suggest_key

SECTIONS = {
    "": ["train", "optimizer"],
    "train": ["steps", "seed"],
    "optimizer": ["lr", "eps"],
    "extra": ["lr"],
}


def test_the_same_section_is_searched_first():
    assert suggest_key("setps", ("train",), SECTIONS) == "did you mean 'train.steps'?"


def test_then_the_same_name_elsewhere():
    assert suggest_key("lr", ("train",), SECTIONS) == "it belongs in optimizer.lr or extra.lr"


def test_then_the_name_that_others_use():
    assert suggest_key("max_grad_norm", ("train",), section_keys()) == "here it is train.gradient_clipping"


def test_a_name_that_others_use_is_not_told_where_there_is_no_such_key():
    assert suggest_key("max_grad_norm", ("train",), SECTIONS) == "train has steps, seed"


@pytest.mark.parametrize(
    ("section", "key", "suggestion"),
    [
        ("train", "log_interval", "here it is logging.interval"),
        ("train", "logging_interval", "did you mean 'logging.interval'?"),
        ("train", "checkpoint_interval", "did you mean 'checkpoint.interval'?"),
        ("data", "weights", "here it is data.mixture"),
        ("optimizer", "scheduler_type", "did you mean 'scheduler.type'?"),
    ],
)
def test_a_name_that_means_the_same_goes_before_one_that_looks_alike(section: str, key: str, suggestion: str) -> None:
    assert suggest_key(key, (section,), section_keys()) == suggestion


def test_words_that_fit_several_keys_lead_to_none_of_them():
    assert suggest_key("min_step", ("train",), {"": ["train"], "train": ["min_steps", "steps_min"]}) == (
        "did you mean 'train.min_steps'?"
    ), "by its letters"


def test_then_a_similar_name_elsewhere():
    assert suggest_key("warmup_step", ("optimizer",), section_keys()) == "did you mean 'scheduler.warmup_steps'?"


def test_else_everything_that_there_is():
    assert suggest_key("zzz", ("train",), SECTIONS) == "train has steps, seed"
    assert suggest_key("zzz", (), SECTIONS) == "the sections are train, optimizer"


def test_every_synonym_leads_to_a_key_that_exists_and_is_no_key_of_that_section_itself():
    keys = section_keys()
    for word, target in SYNONYMS.items():
        section, _, key = target.partition(".")
        assert key in keys[section], target
        assert word not in keys[section], word


def test_nonsense_has_no_suggestion():
    assert closest("qqqq", ["steps"]) is None


def test_values_are_shown_as_they_would_be_typed():
    assert show({"a": [1, None, False, "x y"]}) == "{a: [1, null, false, 'x y']}"
    assert len(show("x" * 500)) == 80
    assert alternatives([3]) == "3"
