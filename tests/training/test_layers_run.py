"""A run of layers, with an engine that computes nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset

from fake_layers_run import NUM_SAMPLES, Events, FakeEngine, Numbers, NumbersTrial
from pipekit.data.collate import MapDataset
from pipekit.engine.late_number import LateNumber
from pipekit.errors import ExitCode, PipekitError, StoppedError
from pipekit.plan.plan import StartPoint
from pipekit.training import layers_run
from pipekit.training.layers_run import LayersLoop
from pipekit.training.trial_callbacks import TrialCallback
from pipekit.training.trial_checkpoint import TrialState


def test_every_sample_comes_once_an_epoch_and_each_step_has_its_own(run: Any) -> None:
    made = run(train={"steps": 5}, data={"shuffle": True})
    result = made.fit()
    assert (result.batch, result.metrics["loss"], result.checkpoint.name) == (5, 5.0, "step-5")
    assert [len(samples) for samples in made.engine.trained] == [4] * 5
    drawn = [sample for samples in made.engine.trained for sample in samples]
    assert sorted(drawn[:NUM_SAMPLES]) == sorted(drawn[NUM_SAMPLES:]) == list(range(NUM_SAMPLES))


def test_the_events_of_a_run_come_in_order(run: Any) -> None:
    made = run(train={"steps": 2, "eval_interval": 2})
    made.fit()
    assert made.events.names == [
        *("start after 0", "evaluation", "step 0", "step 1", "evaluation", "step 2"),
        *("checkpoint 2", "end at 2", "close"),
    ]


def test_the_learning_rate_is_that_of_the_step(run: Any) -> None:
    made = run(train={"steps": 4}, optimizer={"lr": 0.4}, scheduler={"type": "constant", "warmup_steps": 4})
    made.fit()
    assert made.engine.rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [metrics["lr"] for metrics in made.events.metrics] == pytest.approx(made.engine.rates)


def test_groups_have_learning_rates_of_their_own_and_evaluations_and_saves_their_times(run: Any) -> None:
    groups = [{"match": "embed*", "lr_scale": 0.5}, {"match": "*.bias"}, {"match": "*norm*", "frozen": True}]
    optimizer = {"lr": 0.4, "groups": groups}
    made = run(
        train={"steps": 4, "eval_interval": 2},
        optimizer=optimizer,
        scheduler={"type": "constant", "warmup_steps": 4},
        checkpoint={"interval": 2, "keep": None},
    )
    made.fit()
    steps = [each for each in made.events.metrics if "loss" in each]
    assert [each["lr_group0"] for each in steps] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert [each["lr_group1"] for each in steps] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert not any("lr_group2" in each for each in steps)
    assert [each["step"] for each in made.events.metrics if "eval_time_s" in each] == [0, 2, 4]
    assert [each["step"] for each in steps if "save_time_s" in each] == [3]
    assert all(each["peak_memory_bytes"] >= steps[0]["peak_memory_bytes"] > 0 for each in steps)
    assert [(each["samples"], each["tokens"]) for each in steps] == [(4 * n, 4 * 128 * n) for n in (1, 2, 3, 4)]
    assert made.saved[0].metrics["tokens"] == 2 * 4 * 128


def test_evaluations_come_before_the_first_step_at_their_interval_and_at_the_end(run: Any) -> None:
    made = run(train={"steps": 5, "eval_interval": 2})
    result = made.fit()
    evaluated = {each["step"]: each["val_loss"] for each in made.events.metrics if "val_loss" in each}
    # The mean over two batches of a loss that grows by 2 with each.
    assert evaluated == {0: 3.0, 2: 7.0, 4: 11.0, 5: 15.0}
    assert result.validation_metrics["loss"] == 15.0


def test_evaluations_take_the_same_samples_every_time(run: Any) -> None:
    made = run(train={"steps": 2, "eval_interval": 1})
    made.fit()
    assert made.engine.evaluated == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3
    # The means of the largest of 0 to 1, 2 to 3, 4 to 5 and 6 to 7.
    assert [metrics["val_largest"] for metrics in made.events.metrics] == [4.0] * 3


def test_a_run_that_gets_no_better_is_stopped_and_its_checkpoint_knows_the_count(run: Any) -> None:
    made = run(train={"steps": 9, "eval_interval": 2}, callbacks={"early_stopping": {"patience": 2}})
    # 3.0 before the first step, then 7.0 and 11.0.
    assert made.fit().batch == 4
    (saved,) = made.saved
    assert saved.callbacks.pop("numbers_watch") == {"losses": [9.0, 8.0, 7.0, 6.0]}
    assert saved.callbacks == {"early_stopping": {"best": 3.0, "num_worse": 2}}
    # By which a run from this checkpoint would take it for one of a loop of the user's own.
    assert saved.client_state == {}


@pytest.mark.parametrize("eval_ema", [False, True])
def test_the_moving_average_is_evaluated_on_request(run: Any, monkeypatch: pytest.MonkeyPatch, eval_ema: bool) -> None:
    made = run(train={"steps": 1, "eval_interval": 1, "ema": 0.9, "eval_ema": eval_ema})
    order = made.order

    @contextlib.contextmanager
    def ema_weights(engine: FakeEngine) -> Iterator[None]:
        order.append(f"average after {len(engine.trained)} steps, {len(engine.evaluated)} evaluated")
        yield
        order.append(f"weights again, {len(engine.evaluated)} evaluated")

    monkeypatch.setattr(layers_run, "ema_weights", ema_weights)
    made.fit()
    expected = [
        *("average after 0 steps, 0 evaluated", "weights again, 2 evaluated"),
        *("average after 1 steps, 2 evaluated", "weights again, 4 evaluated"),
    ]
    assert order[:-2] == (expected if eval_ema else [])


def test_an_evaluation_needs_data(run: Any) -> None:
    class WithoutValidation(NumbersTrial):
        def build_validation_dataset(self) -> None:
            return None

    with pytest.raises(PipekitError, match=r"eval_interval=5: WithoutValidation has no validation data; set it to"):
        run(train={"eval_interval": 5}, kind=WithoutValidation)


def test_an_iterable_dataset_is_one_error(run: Any) -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(NUM_SAMPLES))

    class Streaming(NumbersTrial):
        def build_train_dataset(self) -> Any:
            return Stream()

    with pytest.raises(PipekitError, match=r"^Streaming.build_train_dataset returned a Stream, which lacks __len__ or"):
        run(kind=Streaming)


def test_replicas_are_checked_at_their_interval(run: Any) -> None:
    made = run(train={"steps": 5, "check_replicas": 2})
    made.fit()
    assert made.engine.num_checks == 2


@pytest.mark.parametrize("run", [False], indirect=True)
def test_the_loss_of_a_step_is_read_after_the_next_one_is_launched(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Noting(FakeEngine):
        def train_batch(self, batches: Iterator[Any]) -> Tensor:
            loss = super().train_batch(batches)
            order.append(f"launch {len(self.trained)}")
            return loss

    read = LateNumber.read

    def note(number: LateNumber) -> float:
        value = read(number)
        # The norms; the losses are larger, and read beside them.
        if value < 1.0:
            order.append(f"read {value}")
        return value

    monkeypatch.setattr(LateNumber, "read", note)
    norms = [0.1, 0.2, 0.3, 0.4, 0.5]
    made = run(train={"steps": 5}, checkpoint={"interval": 3}, engine=Noting(norms))
    made.fit()
    assert order == [
        *("launch 1", "launch 2", "read 0.1", "launch 3", "read 0.2", "read 0.3"),
        *("launch 4", "launch 5", "read 0.4", "read 0.5"),
    ]
    assert [(metrics["step"], metrics["loss"], metrics["grad_norm"]) for metrics in made.events.metrics] == [
        (step + 1, 9.0 - step, norm) for step, norm in enumerate(norms)
    ]


def test_ranks_meet_at_evaluations_and_checkpoints_and_at_no_other_step(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(train={"steps": 9, "eval_interval": 4}, checkpoint={"interval": 6})
    met: set[int] = set()

    def noting(collective: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            met.add(len(made.engine.trained))
            return collective(*args, **options)

        return call

    for name in ("all_gather", "gather", "broadcast", "all_reduce", "barrier"):
        monkeypatch.setattr(dist, name, noting(getattr(dist, name)))
    made.fit()
    assert met == {0, 4, 6, 8, 9}


def test_a_step_is_reported_though_the_next_one_fails(run: Any) -> None:
    class Failing(FakeEngine):
        def train_batch(self, batches: Iterator[Any]) -> Tensor:
            if len(self.trained) == 2:
                raise PipekitError("out of luck")
            return super().train_batch(batches)

    made = run(train={"steps": 5}, engine=Failing())
    with pytest.raises(PipekitError, match="out of luck"):
        made.fit()
    assert made.events.names == ["start after 0", "step 1", "step 2", "close"]


def test_the_next_step_is_collated_while_one_runs_and_none_after_the_last(run: Any) -> None:
    class Noting(Numbers):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            read.append(index)
            if len(read) == 8:
                second_is_read.set()
            return super().__getitem__(index)

    class NotingTrial(NumbersTrial):
        def build_train_dataset(self) -> MapDataset:
            return Noting()

    class Waiting(FakeEngine):
        def train_batch(self, batches: Iterator[Any]) -> Tensor:
            # The first step ends when the second has been collated; else it would wait for ever.
            assert second_is_read.wait(60.0)
            return super().train_batch(batches)

    read: list[int] = []
    second_is_read = threading.Event()
    made = run(train={"steps": 3}, kind=NotingTrial, engine=Waiting(), data={"shuffle": True})
    made.fit()
    assert read == [sample for samples in made.engine.trained for sample in samples]
    assert len(read) == 12
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def test_callbacks_are_closed_when_one_fails(run: Any) -> None:
    made = run(events=Events(fails_at=2))
    with pytest.raises(OSError, match="disk is full"):
        made.fit()
    assert made.events.names == ["start after 0", "step 1", "step 2", "close"]


def test_callbacks_are_closed_though_one_cannot_be(run: Any) -> None:
    class Stuck(TrialCallback):
        def on_trial_shutdown(self) -> None:
            raise OSError("the disk is full")

    class WithStuck(NumbersTrial):
        def build_callbacks(self) -> list[TrialCallback]:
            return [Stuck(), later]

    later = Events()
    made = run(kind=WithStuck)
    with pytest.raises(OSError, match="disk is full"):
        made.fit()
    assert made.events.names[-1] == later.names[-1] == "close"


def test_ranks_that_do_not_report_call_nobody(run: Any) -> None:
    made = run(reports=False)
    assert made.fit().batch == 3
    assert made.events.names == []


class Signalled(FakeEngine):
    """Engine in whose train_batch, eval_batch or save of a number a signal comes."""

    def __init__(self, *, step: int = 0, evaluation: int = 0) -> None:
        super().__init__()
        self._step, self._evaluation = step, evaluation

    def train_batch(self, batches: Iterator[Any]) -> Tensor:
        if len(self.trained) + 1 == self._step:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_batch(batches)

    def eval_batch(self, batches: Iterator[Any], **options: Any) -> Tensor:
        if len(self.evaluated) + 1 == self._evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().eval_batch(batches, **options)


def test_after_a_signal_the_step_is_finished_and_saved(run: Any) -> None:
    made = run(train={"steps": 9}, engine=Signalled(step=4))
    with pytest.raises(StoppedError) as caught:
        made.fit()
    folder = made.run.run.folder.path
    assert str(caught.value) == (
        f"stopped by SIGTERM after step 4 of 9, saved in {folder}/checkpoints/step-4\n"
        f"to go on: pipekit train {folder}/config.yaml"
    )
    assert caught.value.exit_code == ExitCode.STOPPED
    assert [state.step for state in made.saved] == [4]
    assert made.saved[0].metrics["loss"] == 6.0
    # The run has not ended as planned.
    assert made.events.names[-2:] == ["checkpoint 4", "close"]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_signal_during_a_save_lets_it_finish_and_nothing_is_saved_twice(run: Any, in_background: bool) -> None:
    made = run(train={"steps": 9}, checkpoint={"interval": 2, "async": in_background}, engine=Signalled(step=4))
    with pytest.raises(StoppedError, match="after step 4 of 9"):
        made.fit()
    assert made.order == ["save 2", "waited for 2", "save 4", "waited for 4"]


def test_a_signal_stops_an_evaluation_within_a_batch(run: Any) -> None:
    # The first evaluation, of two batches, comes before any step.
    made = run(train={"steps": 9, "eval_interval": 3}, engine=Signalled(evaluation=3))
    with pytest.raises(StoppedError, match="after step 3 of 9"):
        made.fit()
    assert [len(made.engine.evaluated), len(made.engine.trained)] == [3, 3]
    assert [state.step for state in made.saved] == [3]
    assert "val_loss" not in made.saved[0].metrics


@pytest.mark.parametrize(("metrics", "evaluates_first"), [({"val_loss": 1.0}, False), ({"loss": 1.0}, True)])
def test_an_evaluation_that_was_cut_short_is_made_by_the_next_start(
    run: Any, monkeypatch: pytest.MonkeyPatch, metrics: dict[str, float], evaluates_first: bool
) -> None:
    made = run(train={"steps": 4, "eval_interval": 3})
    state = TrialState("", batch=3, metrics=metrics)
    monkeypatch.setattr(LayersLoop, "_read", lambda loop, checkpoint: state)
    plan = replace(made.run.run.plan, start=StartPoint(Path("step-00000003"), 3))
    made.run.run = replace(made.run.run, plan=plan)
    made.fit()
    # The other one is that of the last step.
    assert made.events.names.count("evaluation") == 1 + evaluates_first
    assert ("step 3" in made.events.names) == evaluates_first


def test_a_signal_in_the_last_step_of_a_run_without_evaluations_changes_nothing(run: Any) -> None:
    made = run(train={"steps": 3}, engine=Signalled(step=3))
    assert made.fit().batch == 3
    assert made.events.names[-2:] == ["end at 3", "close"]
