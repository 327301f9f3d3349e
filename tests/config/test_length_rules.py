"""The length of a training in steps, tokens or epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipekit.config import Config, load_config, parse_config
from pipekit.config.growth import samples_of_steps, steps_of_samples, tokens_of_steps
from pipekit.errors import ConfigError
from pipekit.plan.resources import Resources
from pipekit.training.language_model import LanguageModelTrial
from pipekit.training.prepare import prepare_run
from pipekit.training.rates import bind_schedule
from train_runs import pipekit, write_workspace

GROWING = {
    "curriculum": {"min_difficulty": 8, "total_curriculum_step": 9},
    "batch_warmup": {"start": 2, "increment": 2, "samples": 30},
}


def config(data: dict[str, Any] | None = None, **train: Any) -> Config:
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 32}
    return parse_config({"model": {"preset": "tiny"}, "train": {**sizes, **train}, "data": data or {}})


@pytest.mark.parametrize("growth", [{}, GROWING], ids=["equal steps", "growing steps"])
@pytest.mark.parametrize("tokens", [1, 16, 17, 500, 5_000])
def test_tokens_are_the_fewest_steps_that_have_as_many(growth: dict[str, Any], tokens: int) -> None:
    found = config(tokens=tokens, **growth).train
    assert found.tokens is None
    fewest = next(steps for steps in range(1, 1000) if tokens_of_steps(found, steps) >= tokens)
    assert found.steps == fewest


@pytest.mark.parametrize("growth", [{}, GROWING], ids=["equal steps", "growing steps"])
def test_samples_are_the_fewest_steps_that_have_as_many(growth: dict[str, Any]) -> None:
    train = config(steps=1, **growth).train
    for number in range(1, 90):
        fewest = next(steps for steps in range(1, 100) if samples_of_steps(train, steps) >= number)
        assert steps_of_samples(number, train) == fewest


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({}, "train.steps: missing, and it has no default; for example steps: 300, or in its place tokens or epochs"),
        ({"steps": 3, "tokens": 9}, r"train.steps=3 and train.tokens=9 each say how long the training is; remove one"),
        ({"steps": 3, "tokens": 9, "epochs": 1.5}, r"and train.epochs=1.5 each say .*; remove two of them"),
        ({"tokens": 0}, r"train.tokens=0: must be"),
        ({"epochs": -1.0}, r"train.epochs=-1.0: must be"),
    ],
)
def test_none_and_several_are_one_error(lengths: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**lengths)


def test_a_change_takes_the_place_of_what_was_given_in_another_unit(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {preset: tiny}\ntrain: {tokens: 4096}\n")
    assert load_config(path).train.steps == 4
    assert load_config(path, ["train.steps=20"]).train.steps == 20
    by_epochs = load_config(path, ["train.epochs=1.5"]).train
    assert (by_epochs.epochs, by_epochs.has_steps) == (1.5, False)
    # What a run folder keeps is one number, which another takes the place of in turn.
    path.write_text(load_config(path).to_yaml())
    assert load_config(path).train.steps == 4
    assert load_config(path, ["train.tokens=10240"]).train.steps == 10
    assert load_config(path).updated({"train.epochs": 2.0}).updated({"train.steps": 7}).train.epochs is None
    with pytest.raises(ConfigError, match=r"train.steps=3 and train.epochs=2.0 each say how long the training is"):
        load_config(path, ["train.steps=3", "train.epochs=2"])


def test_a_schedule_of_deepspeed_that_is_left_to_pipekit_decays_over_the_steps_that_tokens_are() -> None:
    params = {"total_num_steps": "auto", "warmup_num_steps": 2, "warmup_max_lr": "auto"}
    section = {"scheduler": {"type": "WarmupDecayLR", "params": params}}
    by_steps, by_tokens = (
        parse_config({"model": {"preset": "tiny"}, "train": length, "deepspeed": section})
        for length in ({"steps": 30}, {"tokens": 30 * 8 * 128})
    )
    assert by_tokens.train.steps == 30
    rates, expected = (bind_schedule(each)[0] for each in (by_tokens, by_steps))
    assert [rates(step) for step in range(30)] == [expected(step) for step in range(30)]


def test_epochs_become_steps_when_the_data_are_prepared(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven\n" * 400)
    data = {
        "source": str(tmp_path / "text.txt"),
        "vocab_size": 300,
        "validation_fraction": 0,
        "cache_dir": str(tmp_path),
    }
    found = {}
    for epochs in (0.5, 1.0, 2.5):
        planned = prepare_run(config(data, epochs=epochs), Resources(world_size=1), start=None).plan
        assert planned.config.train.epochs is None
        found[epochs] = planned.config.train.steps
    num_samples = LanguageModelTrial.prepare(config(data, steps=1))["sources"][0]["train"]["num_tokens"] // 32
    for epochs, steps in found.items():
        # A sample needs one more token than it has, as the last label.
        assert steps in {-(-int(epochs * number) // 8) for number in (num_samples - 1, num_samples)}
    assert found[0.5] < found[1.0] < found[2.5]


def test_epochs_that_nothing_tells_the_samples_of_are_refused(tmp_path: Path) -> None:
    entries = {"mixture": [{"name": "a", "source": "a.txt"}, {"name": "b", "source": "b.txt"}]}
    with pytest.raises(ConfigError, match=r"train.epochs=2.0 does not go with data.mixture"):
        config(entries, epochs=2.0)

    class Mine(LanguageModelTrial):
        def build_train_dataset(self) -> Any:
            raise NotImplementedError

    (tmp_path / "text.txt").write_text("one two three four five six seven\n" * 400)
    data = {
        "source": str(tmp_path / "text.txt"),
        "vocab_size": 300,
        "validation_fraction": 0,
        "cache_dir": str(tmp_path),
    }
    given = config(data, epochs=2.0)
    from pipekit.plan.decide import build_specs

    with pytest.raises(ConfigError, match=r"train.epochs=2: Mine does not tell how many samples an epoch has; give"):
        build_specs(given, Mine, Mine.prepare(given))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_goes_on_for_more_epochs(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)
    options = ("parallel.pp=1", "train.eval_interval=null", "run.dir=runs/e", "scheduler.warmup_steps=0")
    rehearsed = pipekit(workspace, "train", "c.yaml", "train.epochs=0.05", *options, "--dry-run")
    assert rehearsed.returncode == 0, rehearsed.stderr
    (row,) = [line.split() for line in rehearsed.stdout.splitlines() if line.startswith("steps ")]
    first = pipekit(workspace, "train", "c.yaml", "train.epochs=0.05", *options)
    assert f"Trained {row[1]} steps" in first.stdout
    again = pipekit(workspace, "train", "c.yaml", "train.epochs=0.05", *options)
    assert f"has trained {row[1]} of {row[1]} steps already" in " ".join(again.stdout.split())
    longer = pipekit(workspace, "train", "runs/e/config.yaml", "train.epochs=0.1")
    assert longer.returncode == 0, longer.stderr
    assert f"going on after step {row[1]}" in longer.stdout
    last = load_config(workspace / "runs/e/config.yaml").train.steps
    assert abs(last - 2 * int(row[1])) <= 1
