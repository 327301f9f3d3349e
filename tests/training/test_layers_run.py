"""A run of layers, with an engine that computes nothing."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset

from pipekit.checkpoint.manifest import TrainingState
from pipekit.config import Config, parse_config
from pipekit.data.batch_loader import MapDataset
from pipekit.distributed.processes import join_alone, leave_processes
from pipekit.engine.late_number import LateNumber
from pipekit.engine.step_trace import Diagnosis, Fault, Place
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import ExitCode, NumbersError, PipekitError, StoppedError, StorageError
from pipekit.hangs.activity import Activity
from pipekit.layers.specs import LayerSpec
from pipekit.models import build_layers
from pipekit.plan.decide import decide_run
from pipekit.plan.plan import StartPoint
from pipekit.plan.resources import Resources
from pipekit.plan.run_folder import RunFolder
from pipekit.training import layers_run, numbers_watch
from pipekit.training.layers_run import LayersLoop, LayersRun
from pipekit.training.layers_trial import LayersTrial, Metric
from pipekit.training.run_context import RunContext
from pipekit.training.slow_saves import SlowSaves
from pipekit.training.trial_callbacks import TrialCallback
from pipekit.training.trial_checkpoint import TrialState
from pipekit.training.trial_loop import TrialResult

NUM_SAMPLES = 10


class Numbers(MapDataset):
    """Samples that are their own index."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(index), torch.tensor(index)


class NumbersTrial(LayersTrial):
    @classmethod
    def build_layers(cls, config: Config) -> list[LayerSpec]:
        return build_layers(config)

    def build_train_dataset(self) -> MapDataset:
        return Numbers()

    def build_validation_dataset(self) -> MapDataset | None:
        return Numbers()

    def validation_metrics(self) -> dict[str, Metric]:
        return {"largest": lambda outputs, labels: outputs.max()}


class FakeEngine(TrainingEngine):
    """Engine that notes what it is called with; its losses and norms are given."""

    def __init__(self, norms: Sequence[float] = ()) -> None:
        self.mpu: Any = SimpleNamespace(activity=Activity())
        self.view = SimpleNamespace(
            step_count=lambda: 1,
            state_names=list,
            loss_scaler_state=lambda: None,
            torch_optimizer=torch.optim.SGD([torch.zeros(1)]),
        )
        self.view.may_overflow, self.view.can_leave_out = False, True
        self.torch_autocast_z0_gradscaler = None
        self.skipped_steps = self.global_steps = 0
        self.rates: list[float] = []
        self.trained: list[list[int]] = []
        self.evaluated: list[list[int]] = []
        self.num_checks = 0
        self._norms = norms

    def train_micro_batch_size_per_gpu(self) -> int:
        return 2

    def gradient_accumulation_steps(self) -> int:
        return 2

    def set_lr(self, lr: float) -> None:
        self.rates.append(lr)

    def train_batch(self, batches: Iterator[Any]) -> Tensor:
        self.trained.append([int(sample) for inputs, _ in batches for sample in inputs])
        self.skipped_steps += not math.isfinite(self._norm)
        return torch.tensor(10.0 - len(self.trained))

    def eval_batch(self, batches: Iterator[Any], *, observe: Any) -> Tensor:
        pairs = list(batches)
        self.evaluated.append([int(sample) for inputs, _ in pairs for sample in inputs])
        for inputs, labels in pairs:
            observe(inputs, labels)
        return torch.tensor(2.0 * len(self.evaluated))

    def check_replicas(self) -> None:
        self.num_checks += 1

    @property
    def late_grad_norm(self) -> LateNumber:
        return LateNumber(self._norm)

    @property
    def _norm(self) -> float:
        place = len(self.trained) - 1
        return self._norms[place] if place < len(self._norms) else 1.0


class Events(TrialCallback):
    """Notes the events of a run, and can fail at a step."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.names: list[str] = []
        self.metrics: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self._fails_at = fails_at

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        self.names.append(f"start after {first_batch_idx}")

    def on_validation_start(self) -> None:
        self.names.append("evaluation")

    def on_warning(self, message: str) -> None:
        self.warnings.append(message)

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        self.names.append(f"step {step}")
        self.metrics.append({"step": step, **metrics})
        if step == self._fails_at:
            raise OSError("the disk is full")

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        self.names.append(f"checkpoint {uuid.removeprefix('step-')}")

    def on_training_end(self, result: TrialResult) -> None:
        self.names.append(f"end at {result.batch}")

    def on_trial_shutdown(self) -> None:
        self.names.append("close")


class Run:
    """One run of the loop: its engine, events and the states that it saved."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        *,
        engine: FakeEngine | None = None,
        events: Events | None = None,
        kind: type[LayersTrial] = NumbersTrial,
        reports: bool = True,
        diagnosis: Diagnosis = Diagnosis(None),  # noqa: B008
        full_at: Collection[int] = (),
        **sections: dict[str, Any],
    ) -> None:
        self.engine = engine or FakeEngine()
        self.events = events or Events()
        self.saved: list[TrainingState] = []
        self.order: list[str] = []
        train = {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "eval_interval": None, "eval_batches": 2}
        values = {
            "model": {"preset": "tiny", "vocab_size": 500},
            "run": {"dir": str(folder)},
            **sections,
            "train": {**train, **sections.get("train", {})},
        }
        decision = decide_run(parse_config(values), kind, Resources(world_size=1))
        unit: Any = SimpleNamespace(
            should_report_metrics=reports,
            should_build_data_loader=True,
            data_parallel_rank=0,
            activity=Activity(),
        )
        context = RunContext(decision.plan, decision.specs, unit, torch.device("cpu"), RunFolder(folder))

        def save(engine: FakeEngine, folder: Path, *, training: TrainingState, **others: Any) -> Any:
            path = folder / f"step-{training.step}"
            self.order.append(f"save {training.step}")
            error = StorageError(f"{path.name}: cannot be written: the disk is full")
            error.is_everyones = True
            is_full = training.step in full_at
            if is_full and others["background"] is None:
                raise error
            self.saved.append(training)

            def wait() -> Path:
                self.order.append(f"waited for {training.step}")
                if is_full:
                    raise error
                return path

            return SimpleNamespace(
                path=path,
                in_background=others["background"] is not None,
                is_done=True,
                seconds=0.1,
                wait=wait,
                settle=lambda timeout_s: self.order.append("settled"),
            )

        monkeypatch.setattr(LayersRun, "_build_engine", lambda run: self.engine)
        monkeypatch.setattr(layers_run, "save_checkpoint", save)
        monkeypatch.setattr(numbers_watch, "diagnose_step", lambda engine, batches, *, step: diagnosis)
        monkeypatch.setattr(RunContext, "reduce_mean", lambda context, value: value)
        self.run = LayersRun(kind(context))

    def fit(self) -> TrialResult:
        return self.run.fit([self.events])


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """This process is all of the run."""
    join_alone(device="cpu")
    yield
    leave_processes()


@pytest.fixture(params=[True, False], ids=["as on a CPU", "as on a GPU"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Builder of a run whose numbers are on the host as soon as a step is launched, or are never seen to be there."""
    monkeypatch.setattr(LateNumber, "is_here", request.param)
    return lambda **settings: Run(monkeypatch, tmp_path, **settings)


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


def test_checkpoints_come_at_their_interval_and_at_the_end(run: Any) -> None:
    made = run(train={"steps": 5}, checkpoint={"interval": 2})
    made.fit()
    assert [(state.step, state.consumed_samples) for state in made.saved] == [(2, 8), (4, 16), (5, 20)]
    assert [state.metrics["loss"] for state in made.saved] == [8.0, 6.0, 5.0]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_in_the_background_is_waited_for_before_the_next_and_at_the_end(run: Any, in_background: bool) -> None:
    made = run(train={"steps": 5}, checkpoint={"interval": 2, "async": in_background})
    result = made.fit()
    assert made.order == [f"{event} {step}" for step in (2, 4, 5) for event in ("save", "waited for")]
    assert result.checkpoint.name == "step-5"
    reported = [name for name in made.events.names if name.startswith(("checkpoint", "step"))]
    # What is written in the background is reported when it is waited for.
    at = reported.index("checkpoint 2")
    assert reported[at - 1] == ("step 4" if in_background else "step 2")


def test_a_save_in_the_background_is_written_out_where_training_fails(run: Any) -> None:
    made = run(train={"steps": 5}, checkpoint={"interval": 2, "async": True}, events=Events(fails_at=3))
    with pytest.raises(OSError, match="disk is full"):
        made.fit()
    assert made.order == ["save 2", "settled"]


def test_replicas_are_checked_at_their_interval(run: Any) -> None:
    made = run(train={"steps": 5, "check_replicas": 2})
    made.fit()
    assert made.engine.num_checks == 2


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


def test_each_row_of_bad_steps_is_told_once_and_not_for_ever(run: Any) -> None:
    norms = [math.nan if step % 3 else 1.0 for step in range(61)]
    made = run(train={"steps": 61}, engine=FakeEngine(norms), diagnosis=fault(OUTPUT))
    made.fit()
    assert len(made.events.warnings) == 20
    traced = [warning for warning in made.events.warnings if "the first number that is not finite" in warning]
    assert traced == made.events.warnings[:10]


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


def test_skipped_steps_with_others_between_them_do_not(run: Any) -> None:
    norms = [1.0 if step in (*range(0, 50, 20), 49) else math.nan for step in range(50)]
    assert run(train={"steps": 50}, engine=FakeEngine(norms)).fit().batch == 50


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

    def eval_batch(self, batches: Iterator[Any], *, observe: Any) -> Tensor:
        if len(self.evaluated) + 1 == self._evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().eval_batch(batches, observe=observe)


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


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_told_and_the_run_goes_on_if_told_so(run: Any, in_background: bool) -> None:
    settings = {"interval": 2, "async": in_background, "on_error": "warn"}
    made = run(train={"steps": 8}, checkpoint=settings, full_at=(4,))
    assert made.fit().checkpoint.name == "step-8"
    assert made.events.warnings == [
        "step-4: cannot be written: the disk is full; training goes on, and saves again when that is due; the newest "
        f"checkpoint is {made.run.run.folder.checkpoints}/step-2"
    ]
    assert [name for name in made.events.names if "checkpoint" in name] == [f"checkpoint {step}" for step in (2, 6, 8)]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(("on_error", "full_at"), [("stop", 4), ("warn", 8)])
def test_a_full_disk_ends_the_run_where_not_told_so_and_after_the_last_step(
    run: Any, in_background: bool, on_error: str, full_at: int
) -> None:
    settings = {"interval": 4, "async": in_background, "on_error": on_error}
    made = run(train={"steps": 8}, checkpoint=settings, full_at=(full_at,))
    with pytest.raises(StorageError, match=f"^step-{full_at}: cannot be written: the disk is full$"):
        made.fit()
    assert made.events.warnings == []
    assert [name for name in made.events.names if "checkpoint" in name] == (["checkpoint 4"] if full_at == 8 else [])


@pytest.mark.parametrize("is_full_for_ever", [False, True])
def test_a_stop_after_a_save_that_has_failed_saves_again(run: Any, is_full_for_ever: bool) -> None:
    full_at = {2}

    class Stopping(Events):
        def on_warning(self, message: str) -> None:
            super().on_warning(message)
            os.kill(os.getpid(), signal.SIGTERM)
            if not is_full_for_ever:
                full_at.clear()

    settings = {"interval": 2, "on_error": "warn"}
    made = run(train={"steps": 8}, checkpoint=settings, full_at=full_at, events=Stopping())
    with pytest.raises(StorageError if is_full_for_ever else StoppedError, match="step-2"):
        made.fit()
    assert made.order[:2] == ["save 2", "save 2"]
    assert [state.step for state in made.saved] == ([] if is_full_for_ever else [2])


@pytest.mark.parametrize("in_background", [False, True])
def test_a_slow_disk_is_told_once_with_what_to_do(
    run: Any, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    monkeypatch.setattr(SlowSaves, "end", lambda saves: (20.0, 100.0))
    made = run(train={"steps": 8}, checkpoint={"interval": 2, "async": in_background})
    made.fit()
    background = "" if in_background else "set checkpoint.async=true, or "
    (warning,) = made.events.warnings
    assert warning.startswith("step 2: training stood still for 20.0 of the last 100.0 s to save")
    assert warning.endswith(f"; {background}give a longer checkpoint.interval or a run.dir on a faster disk")


def test_the_only_save_of_a_run_is_not_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowSaves, "end", lambda saves: (20.0, 100.0))
    made = run(train={"steps": 8})
    made.fit()
    assert made.events.warnings == []
