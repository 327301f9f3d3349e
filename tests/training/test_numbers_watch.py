"""Steps that are not finite, computed twice, or spikes: what is told, and when the run ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_layers_run import FakeEngine
from pipekit.config import parse_config
from pipekit.engine.step_trace import Diagnosis, Fault, Place
from pipekit.errors import NumbersError, PipekitError
from pipekit.training import numbers_watch
from pipekit.training.numbers_watch import NumbersWatch

OUTPUT = Place("activation", 3, 2, "blocks.0.mlp", "the output of blocks.0.mlp", 4)
WEIGHT = Place("weight", None, 2, "blocks.0.mlp", "the weight blocks.0.mlp.up.weight", 0)


def fault(place: Place) -> Diagnosis:
    return Diagnosis(Fault(place, rank=2, stage=1, replica=0))


def test_steps_are_computed_twice_at_their_interval(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twice: list[int] = []

    def checked(engine: FakeEngine, batches: Iterator[Any]) -> Tensor:
        twice.append(len(engine.trained) + 1)
        return engine.train_batch(batches)

    monkeypatch.setattr(numbers_watch, "train_batch_checked", checked)
    assert run(train={"steps": 7, "check_computation": 3}).fit().batch == 7
    assert twice == [3, 6]


@pytest.mark.parametrize(("key", "value"), [("check_computation", 3), ("on_spike", "skip")])
def test_what_needs_an_update_left_out_is_refused_where_none_can_be(run: Any, key: str, value: Any) -> None:
    engine = FakeEngine()
    engine.view.can_leave_out = False
    with pytest.raises(PipekitError, match=rf"^train.{key}={value} needs an optimizer that can leave an update out"):
        run(train={key: value}, engine=engine)


def test_a_gradient_that_stays_infinite_ends_the_run_with_the_place_where_it_began(run: Any) -> None:
    made = run(train={"steps": 50}, engine=FakeEngine(norms=[1.0, *[math.inf] * 49]), diagnosis=fault(OUTPUT))
    place = "the output of blocks.0.mlp, on rank 2 (stage 1), in micro-batch 3"
    with pytest.raises(
        NumbersError, match=r"^step 21: the loss or the gradient was not finite in 20 steps in a row"
    ) as caught:
        made.fit()
    began = f"step 2: the gradient is not finite (loss 8); the first number that is not finite is in {place}. "
    assert began in str(caught.value)
    assert str(caught.value).endswith(
        "What helps: lower optimizer.lr=0.0003 or lengthen scheduler.warmup_steps=0; where that changes nothing, look "
        "at the layer that is named"
    )
    assert made.events.warnings == [began + "The step has changed nothing"]
    assert made.saved == []
    assert made.events.names[-2:] == ["step 21", "close"]


def test_a_weight_that_is_not_finite_ends_the_run_at_once(run: Any) -> None:
    made = run(train={"steps": 50}, engine=FakeEngine(norms=[1.0, math.nan]), diagnosis=fault(WEIGHT))
    expected = (
        r"^step 2: .* is in the weight blocks.0.mlp.up.weight, on rank 2 \(stage 1\); no later step can be finite"
    )
    with pytest.raises(NumbersError, match=expected):
        made.fit()
    assert made.events.names[-2:] == ["step 2", "close"]


@pytest.mark.parametrize(("steps", "num_bad", "fails"), [(5, 1, False), (5, 2, True), (1, 1, True)])
def test_a_run_whose_last_steps_are_not_finite_has_not_trained(run: Any, steps: int, num_bad: int, fails: bool) -> None:
    made = run(train={"steps": steps}, engine=FakeEngine([*[1.0] * (steps - num_bad), *[math.nan] * num_bad]))
    if not fails:
        assert made.fit().batch == steps
        return
    with pytest.raises(NumbersError, match=r"in the last (2 steps|step), and nothing was learned.* of the moment"):
        made.fit()
    assert made.saved == []


def test_an_overflow_under_a_loss_scale_that_can_be_lowered_is_not_traced(run: Any) -> None:
    engine = FakeEngine([1.0, math.inf, 1.0])
    engine.view.may_overflow = True
    made = run(engine=engine)
    made.fit()
    assert made.events.warnings == []


def test_a_run_may_end_with_overflows_under_a_loss_scale_that_can_be_lowered(run: Any) -> None:
    engine = FakeEngine([1.0, math.inf, math.inf])
    engine.view.may_overflow = True
    assert run(engine=engine).fit().batch == 3


def test_where_nothing_is_found_the_next_step_is_traced_again(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(train={"steps": 50}, engine=FakeEngine(norms=[1.0, *[math.inf] * 49]))
    found = [Diagnosis(None), fault(OUTPUT)]
    monkeypatch.setattr(numbers_watch, "diagnose_step", lambda engine, batches, *, step: found.pop(0))
    with pytest.raises(NumbersError, match=r"It began in step 3: .* is in the output of blocks.0.mlp"):
        made.fit()
    assert found == []


def test_each_row_of_bad_steps_is_told_once_and_not_for_ever(run: Any) -> None:
    norms = [math.nan if step % 3 else 1.0 for step in range(61)]
    made = run(train={"steps": 61}, engine=FakeEngine(norms), diagnosis=fault(OUTPUT))
    made.fit()
    assert len(made.events.warnings) == 20
    traced = [warning for warning in made.events.warnings if "the first number that is not finite" in warning]
    assert traced == made.events.warnings[:10]


def test_skipped_steps_with_others_between_them_do_not(run: Any) -> None:
    norms = [1.0 if step in (*range(0, 50, 20), 49) else math.nan for step in range(50)]
    assert run(train={"steps": 50}, engine=FakeEngine(norms)).fit().batch == 50


class SpikingEngine(FakeEngine):
    """Engine with losses that are given; its loss scale is halved where an update is left out."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses, self.scale = losses, 64.0
        self.view.accepts = None
        self.view.loss_scaler_state = lambda: {"scale": self.scale}
        self.view.load_loss_scaler_state = lambda state: setattr(self, "scale", state["scale"])

    def train_batch(self, batches: Any) -> Tensor:
        loss = self.losses.pop(0)
        if self.view.accepts is not None and not self.view.accepts(loss):
            self.skipped_steps += 1
            self.scale /= 2
        return torch.tensor(loss)


def watch_losses(losses: list[float], *, on_spike: str, is_late: bool) -> tuple[NumbersWatch, SpikingEngine]:
    """Train on batches of 4 samples; `is_late` reports each loss after the next step has been launched."""
    train = {"steps": 50, "global_batch_size": 4, "spike_window": 5, "on_spike": on_spike}
    engine = SpikingEngine(list(losses))
    watch = NumbersWatch(engine, parse_config({"model": {"preset": "tiny"}, "train": train}), precision="fp16")
    for step in range(1, len(losses) + 1):
        watch.train_batch(step, lambda: None, samples=range(4 * step - 4, 4 * step))
        if is_late and step > 1:
            watch.on_metrics(step - 1, {"loss": losses[step - 2]})
        if not is_late or step == len(losses):
            watch.on_metrics(step, {"loss": losses[step - 1]})
    return watch, engine


@pytest.mark.parametrize("is_late", [False, True])
def test_an_update_that_a_spike_leaves_out_counts_once_and_not_against_the_loss_scale(is_late: bool) -> None:
    watch, engine = watch_losses([*[2.0] * 5, 9.0, 2.0], on_spike="skip", is_late=is_late)
    assert [spike.step for spike in watch.take_spikes()] == [6]
    assert watch.state_dict() == {"losses": [2.0, 2.0, 2.0, 9.0, 2.0]}
    assert (engine.scale, watch.num_skipped) == (64.0, 0)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_run_goes_back_because_of_the_first_of_two_spikes_and_past_its_samples(is_late: bool) -> None:
    watch, _ = watch_losses([*[2.0] * 5, 9.0, 9.0], on_spike="rollback", is_late=is_late)
    assert watch.spike is not None
    assert (watch.spike.step, watch.spike.first_sample, watch.spike.end) == (6, 20, 24)
