"""Batch arithmetic and the step from the parallel section to a layout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekit.config import BatchPlan, Config, parse_config, plan_batch, resolve_layout
from pipekit.errors import ConfigError, LayoutError
from pipekit.layout import Layout


def config_of(**train: int) -> Config:
    return parse_config({"model": {"preset": "tiny"}, "train": {"steps": 1, **train}})


@given(micro=st.integers(1, 64), micros=st.integers(1, 64), dp=st.integers(1, 64))
def test_the_parts_multiply_to_the_whole(micro: int, micros: int, dp: int):
    plan = plan_batch(config_of(global_batch_size=micro * micros * dp, micro_batch_size=micro), dp)
    assert plan == BatchPlan(micro_batch_size=micro, num_micro_batches=micros, dp=dp)
    assert plan.global_batch_size == micro * micros * dp


@given(size=st.integers(1, 200), dp=st.integers(1, 16))
def test_a_batch_is_refused_exactly_when_it_does_not_divide(size: int, dp: int):
    config = config_of(global_batch_size=size)
    if size % dp == 0:
        assert plan_batch(config, dp).num_micro_batches == size // dp
    else:
        with pytest.raises(ConfigError, match=rf"train\.global_batch_size={size} is not a multiple of"):
            plan_batch(config, dp)


@given(size=st.integers(1, 60), micro=st.integers(1, 60), dp=st.integers(1, 8))
def test_what_the_message_suggests_is_accepted(size: int, micro: int, dp: int):
    if size % micro:
        return  # refused already when the configuration is read
    config = config_of(global_batch_size=size, micro_batch_size=micro)
    try:
        plan_batch(config, dp)
    except ConfigError as error:
        suggestion = str(error).split("try ")[1]
        sizes = suggestion.split(",")[0].removeprefix("train.global_batch_size=").split(" or ")
        for number in sizes:
            plan_batch(config.updated({"train.global_batch_size": int(number)}), dp)
        if "train.micro_batch_size=" in suggestion:
            plan_batch(config.updated({"train.micro_batch_size": int(suggestion.rpartition("=")[2])}), dp)


def test_auto_fills_the_processes_then_the_devices_then_is_one():
    config = config_of().updated({"parallel.pp": 2})
    assert resolve_layout(config, world_size=8, num_devices=2) == Layout(pp=2, dp=4)
    assert resolve_layout(config, num_devices=4) == Layout(pp=2, dp=2)
    assert resolve_layout(config) == Layout(pp=2, dp=1)
    reordered = config.updated({"parallel.order": ["data", "tensor", "pipe"]})
    assert resolve_layout(reordered, world_size=8) == Layout(pp=2, dp=4, order=("data", "tensor", "pipe"))


def test_degrees_that_do_not_fit_are_refused():
    config = config_of().updated({"parallel.pp": 3})
    with pytest.raises(LayoutError, match=r"parallel.pp=3 .* does not divide 8"):
        resolve_layout(config, world_size=8)
    with pytest.raises(LayoutError, match="4 processes were started"):
        resolve_layout(config.updated({"parallel.dp": 2}), world_size=4)
