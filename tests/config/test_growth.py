"""Sequences and batches that grow: as in DeepSpeed and Megatron, and counted as a loop over all steps counts them."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipekit.config import Config, parse_config
from pipekit.config.growth import batch_size_at, samples_of_steps, sequence_length_at, steps_of_tokens, tokens_of_steps
from pipekit.errors import ConfigError


def config(train: dict[str, Any], **sections: Any) -> Config:
    return parse_config({"model": {"preset": "tiny"}, "train": {"steps": 50, **train}, **sections})


SCHEDULES: list[dict[str, Any]] = [
    {"type": "linear", "min_difficulty": 8, "total_curriculum_step": 30, "difficulty_step": 8},
    {"type": "linear", "min_difficulty": 10, "max_difficulty": 60, "total_curriculum_step": 13, "difficulty_step": 16},
    {"type": "linear", "min_difficulty": 64, "total_curriculum_step": 10, "difficulty_step": 8},
    {"type": "root", "min_difficulty": 3, "total_curriculum_step": 40, "difficulty_step": 1, "root_degree": 2},
    {"type": "root", "min_difficulty": 8, "total_curriculum_step": 25, "difficulty_step": 8, "root_degree": 3},
    {"type": "discrete", "difficulty": [5, 16, 64], "max_step": [3, 30]},
]


@pytest.mark.parametrize("curriculum", SCHEDULES, ids=str)
def test_lengths_are_those_of_deepspeeds_scheduler(curriculum: dict[str, Any]) -> None:
    train = config({"sequence_length": 64, "curriculum": curriculum}).train
    lengths = curriculum.get("difficulty", [curriculum.get("min_difficulty"), curriculum.get("max_difficulty", 64)])
    schedule = {key: curriculum[key] for key in curriculum if key not in ("type", "min_difficulty", "max_difficulty")}
    theirs = CurriculumScheduler(
        {
            "min_difficulty": lengths[0],
            "max_difficulty": lengths[-1],
            "schedule_type": f"fixed_{curriculum['type']}",
            "schedule_config": schedule,
        }
    )
    steps = range(1, 80)
    assert [sequence_length_at(train, step) for step in steps] == [theirs.update_difficulty(step) for step in steps]


def test_batches_grow_as_in_megatron() -> None:
    start, increment, samples, largest = 4, 2, 100, 16
    train = config(
        {"global_batch_size": largest, "batch_warmup": {"start": start, "increment": increment, "samples": samples}}
    ).train
    share = samples / ((largest - start) // increment)
    for position in range(150):
        expected = largest if position > samples else start + int(position / share) * increment
        assert batch_size_at(train, position) == expected


@settings(max_examples=10)
@given(
    curriculum=st.sampled_from([None, *SCHEDULES]),
    start=st.integers(1, 8),
    increment=st.integers(1, 5),
    samples=st.integers(1, 200),
    position=st.integers(0, 100),
)
def test_samples_and_tokens_of_many_steps_are_those_of_each(
    curriculum: dict[str, Any] | None, start: int, increment: int, samples: int, position: int
) -> None:
    assume((13 - start) % increment == 0)
    warmup = {"start": start, "increment": increment, "samples": samples}
    sizes = {"global_batch_size": 13, "sequence_length": 64}
    train = config({**sizes, "curriculum": curriculum, "batch_warmup": warmup}).train
    consumed, from_position, tokens = 0, position, 0
    for step in range(1, 45):
        size = batch_size_at(train, consumed)
        consumed += size
        from_position += batch_size_at(train, from_position)
        last = size * sequence_length_at(train, step)
        tokens += last
        assert samples_of_steps(train, step) == consumed
        assert samples_of_steps(train, step, position=position) == from_position - position
        assert tokens_of_steps(train, step) == tokens
        assert steps_of_tokens(tokens, train) == steps_of_tokens(tokens - last + 1, train) == step


def test_lengths_of_the_learning_rate_in_tokens_count_what_is_trained_on() -> None:
    train = {"global_batch_size": 4, "sequence_length": 64, "curriculum": SCHEDULES[-1]}
    # Three steps of 4 x 5 tokens, and 4 x 16 in each of the next.
    assert config(train, scheduler={"warmup_tokens": 60 + 2 * 64}).warmup_steps == 5


@pytest.mark.parametrize(
    ("train", "parallel", "message"),
    [
        (
            {"curriculum": {"min_difficulty": 8}},
            {},
            r"train.curriculum.total_curriculum_step: missing, and type=linear",
        ),
        (
            {"curriculum": {"type": "discrete", "difficulty": [8, 16], "max_step": [3], "root_degree": 2}},
            {},
            r"train.curriculum.root_degree=2 has no effect with type=discrete; remove it",
        ),
        (
            {"curriculum": {"min_difficulty": 8, "max_difficulty": 256, "total_curriculum_step": 3}},
            {},
            r"max_difficulty=256 is more than train.sequence_length=128.*; try 128",
        ),
        ({"curriculum": {"min_difficulty": 256, "total_curriculum_step": 3}}, {}, r"min_difficulty=256 is more than"),
        (
            {"curriculum": {"type": "discrete", "difficulty": [8, 16, 12], "max_step": [3, 2]}},
            {},
            r"(?s)difficulty=\[8, 16, 12\] must grow.*max_step=\[3, 2\] must grow",
        ),
        (
            {"curriculum": {"type": "discrete", "difficulty": [8, 16], "max_step": [3, 5]}},
            {},
            r"max_step has 2 entries for 2 lengths, and needs one less",
        ),
        (
            {"curriculum": {"type": "discrete", "difficulty": [8, 256], "max_step": [3]}},
            {},
            r"difficulty ends with 256, more than train.sequence_length=128",
        ),
        (
            {"curriculum": {"min_difficulty": 8, "total_curriculum_step": 3, "difficulty_step": 9}},
            {"tp": 2},
            r"parallel.tp=2 does not divide 9 of train.curriculum.difficulty_step.*; try 10, or parallel.seq",
        ),
        (
            {"curriculum": {"type": "discrete", "difficulty": [9, 128], "max_step": [3]}},
            {"tp": 2},
            r"parallel.tp=2 does not divide 9 of train.curriculum.difficulty",
        ),
        ({"batch_warmup": {"start": 8, "increment": 1, "samples": 9}}, {}, r"start=8 must be less than .*=8.*; try 4"),
        ({"batch_warmup": {"start": 2, "increment": 4, "samples": 9}}, {}, r"increment=4 does not lead from .*; try 3"),
        (
            {"batch_warmup": {"start": 3, "increment": 5, "samples": 9}},
            {"dp": 2},
            r"start=3 is not a multiple of train.micro_batch_size=1 x dp=2, which is 2; try 2 or 4",
        ),
        (
            {"batch_warmup": {"start": 2, "increment": 3, "samples": 9}, "micro_batch_size": 2},
            {},
            r"increment=3 is not a multiple of train.micro_batch_size=2; try 2 or 4",
        ),
        (
            {"batch_warmup": {"start": 2, "increment": 3, "samples": 9}},
            {"pp": 2, "dp": 1, "schedule": "interleaved-1f1b"},
            r"train.batch_warmup has steps of 5 sequences on the way: ",
        ),
        (
            {"batch_warmup": {"start": 4, "increment": 2, "samples": 9}},
            {"auto": True},
            r"does not go with parallel.auto",
        ),
        ({"layer_drop": True}, {"zero": 2}, r"train.layer_drop does not go with parallel.zero=2"),
        ({"layer_drop": True, "compile": True}, {}, r"train.layer_drop does not go with train.compile=true"),
        ({"layer_drop": {"theta": 0}}, {}, r"train.layer_drop.theta=0: must be .*greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(train: dict[str, Any], parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(train, parallel=parallel, scheduler={"warmup_tokens": 1000})


def test_a_table_of_ones_own_has_one_number_of_micro_batches(tmp_path: Any) -> None:
    table = tmp_path / "table.csv"
    table.write_text("0F0,0B0\n")
    warmup = {"start": 4, "increment": 2, "samples": 9}
    with pytest.raises(ConfigError, match=r"train.batch_warmup changes the number of micro-batches, and the table of"):
        config({"batch_warmup": warmup}, parallel={"schedule": str(table)})
