"""Watch over the numbers of a run: steps that are not finite are left out, traced to where they begin, and limited."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipekit.config import Config
from pipekit.distributed.processes import gather_objects
from pipekit.engine.computation_check import train_batch_checked
from pipekit.engine.micro_batches import MicroBatch
from pipekit.engine.step_trace import Diagnosis, diagnose_step
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import ConfigError, NumbersError
from pipekit.training.spikes import SpikeDetector
from pipekit.training.trial_callbacks import TrialCallback

# A loss that stays infinite or not a number will not come back by itself.
_MAX_SKIPPED_IN_A_ROW = 20
# A run that ends with so many has gone wrong; after fewer, the weights are those of the step before.
_MAX_SKIPPED_AT_THE_END = 2
# Each takes as long as a step. Later ones are told without a place.
_MAX_TRACES = 10
# To one and the same checkpoint. Other data have not helped then.
_MAX_ROLLBACKS = 3

Batches = Callable[[], Iterator[MicroBatch] | None]
"""Returns this rank's micro-batches of a step, anew at every call."""


@dataclass(frozen=True)
class Spike:
    """A loss that stands far above the last ones.

    Attributes:
        step: the step, counted from 1.
        loss: its loss.
        score: its robust z-score.
        first_sample: position in the training data of the first sample of its batch.
        end: position after its last.
    """

    step: int
    loss: float
    score: float
    first_sample: int
    end: int

    def __str__(self) -> str:
        return (
            f"step {self.step}: the loss of {self.loss:.4g} is a spike, {self.score:.1f} spreads above the median of "
            f"the last ones (samples {self.first_sample} to {self.end - 1})"
        )


class NumbersWatch(TrialCallback):
    """Trains each step, and ends the run, on every rank alike, where its numbers go wrong.

    A step whose loss or gradient is not finite has no update. The first of several in a row is computed again with
    hooks, to find the layer, the rank and the micro-batch in which it begins; an ordinary overflow under fp16's loss
    scale is not. Losses that are finite are watched for spikes.

    Args:
        engine: what to train.
        config: the run's.
        precision: number format of the computation.

    Attributes:
        num_skipped: steps in a row up to now whose updates were left out, other than those of spikes.
        spike: the spike because of which the run is to go back to the last checkpoint.
    """

    def __init__(self, engine: TrainingEngine, config: Config, *, precision: str) -> None:
        train = config.train
        wishes = {"check_computation": train.check_computation, "on_spike": train.on_spike == "skip" and "skip"}
        for key, value in wishes.items():
            if value and not engine.can_compute_again:
                raise ConfigError(
                    f"train.{key}={value} needs an optimizer that can leave an update out; leave torch_autocast, "
                    "check_grad_overflow and compute_grad_norm out of the deepspeed section"
                )
        self._engine, self._config, self._precision = engine, config, precision
        self.num_skipped = 0
        self._step = 0
        self._num_trained = 0
        self._num_unusual = 0
        self._num_traces = 0
        self._first: tuple[int, str, Diagnosis | None] | None = None
        self._warnings: list[str] = []
        self._spikes: list[Spike] = []
        self.spike: Spike | None = None
        self._rollbacks: dict[int, int] = {}
        self._detector: SpikeDetector | None = None
        self._num_seen = 0
        self._samples: dict[int, range] = {}
        if train.spike_threshold is not None:
            self._detector = SpikeDetector(window=train.spike_window, threshold=train.spike_threshold)
            if train.on_spike == "skip":
                engine.view.accepts = lambda loss: not self._see(self._step, loss)

    def train_batch(self, step: int, batches: Batches, *, samples: range) -> Tensor:
        """Launch a step, and look at what came of it.

        Args:
            step: its number, counted from 1.
            batches: its data.
            samples: positions of its batch in the training data.

        Returns:
            Its loss.
        """
        engine, self._step = self._engine, step
        # The loss of the step before may not have been read yet.
        self._samples = {each: those for each, those in self._samples.items() if each == step - 1} | {step: samples}
        self._num_trained += 1
        may_overflow, skipped, scaler = engine.view.may_overflow, engine.skipped_steps, engine.view.loss_scaler_state()
        every = self._config.train.check_computation
        if every is None or step % every:
            loss = engine.train_batch(batches())
        else:
            loss = train_batch_checked(engine, batches())
        if self._spikes and self._spikes[-1].step == step and self._config.train.on_spike == "skip":
            # It says nothing about the scale.
            engine.view.load_loss_scaler_state(scaler)
            return loss
        if engine.skipped_steps == skipped:
            self.num_skipped = self._num_unusual = 0
            self._first = None
            return loss
        self.num_skipped += 1
        # Under fp16 tensor-parallel ranks could see losses that differ.
        if not may_overflow or any(gather_objects(not math.isfinite(float(loss)))):
            self._num_unusual += 1
            found_nothing = self._first is None or self._first[2] == Diagnosis(None)
            if self._first is None or (found_nothing and self._num_traces < _MAX_TRACES):
                self._trace(float(loss), batches)
        return loss

    def _trace(self, loss: float, batches: Batches) -> None:
        diagnosis = None
        if self._num_traces < _MAX_TRACES:
            self._num_traces += 1
            self._engine.mpu.activity.note("computing the step again, to find what is not finite")
            diagnosis = diagnose_step(self._engine, batches, step=self._step - 1)
        what = f"the gradient is not finite (loss {loss:.4g})" if math.isfinite(loss) else f"the loss is {loss}"
        told = what if diagnosis is None else f"{what}; {_describe(diagnosis)}"
        self._first = self._step, told, diagnosis
        self._warnings.append(f"step {self._step}: {told}. The step has changed nothing")

    def warn(self, message: str) -> None:
        """Let something be told that every rank has found."""
        self._warnings.append(message)

    def take_warnings(self) -> list[str]:
        """Return the messages to be told, the same on every rank, and forget them."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def take_spikes(self) -> list[Spike]:
        """Return the spikes that are to be written down, the same on every rank, and forget them."""
        spikes, self._spikes = self._spikes, []
        return spikes

    def _see(self, step: int, loss: float) -> bool:
        """Compare the loss of a step with the last ones, once; return whether it is a spike."""
        if self._detector is None or step <= self._num_seen:
            return False
        self._num_seen = step
        score = self._detector.add(loss)
        if score is None or score <= self._detector.threshold:
            return False
        samples = self._samples[step]
        spike = Spike(step, loss, score, samples.start, samples.stop)
        self._spikes.append(spike)
        self._warnings.append(f"{spike}{'; its update is left out' if self._config.train.on_spike == 'skip' else ''}")
        if self._config.train.on_spike == "rollback" and self.spike is None:
            self.spike = spike
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, so that a run that goes on finds the same spikes."""
        return {} if self._detector is None else {"losses": list(self._detector.losses)}

    def load_state_dict(self, state_dict: Mapping[str, Any], step: int = 0) -> None:
        """Go on after a step with what a checkpoint has kept."""
        self._num_seen, self.num_skipped, self._num_unusual, self._first, self.spike = step, 0, 0, None, None
        if self._detector is not None:
            self._detector.restore(map(float, state_dict.get("losses", ())))

    def count_rollback(self, spike: Spike, step: int) -> None:
        """Note that the run goes back to the checkpoint of a step because of a spike.

        Raises:
            NumbersError: on every rank, if it has gone back there too often.
        """
        count = self._rollbacks[step] = self._rollbacks.get(step, 0) + 1
        if count > _MAX_ROLLBACKS:
            raise NumbersError(
                f"{spike}: the run has gone back to the checkpoint of step {step} {_MAX_ROLLBACKS} times, to "
                f"other data each time; lower optimizer.lr={self._config.optimizer.lr:g}, go on from an earlier one "
                "with checkpoint.resume=<its folder>, or set a higher train.spike_threshold"
            )

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """End the run where a step, which has been reported, was the last of too many.

        Raises:
            NumbersError: on every rank.
        """
        if "loss" in metrics:
            self._see(step, metrics["loss"])
        if step != self._step or not self.num_skipped:
            return
        first = self._first
        at_the_end = min(_MAX_SKIPPED_AT_THE_END, self._num_trained)
        if first is not None and first[2] is not None and _is_in_weights(first[2]):
            raise NumbersError(f"step {step}: {first[1]}; {self._advice()}")
        if self.num_skipped >= _MAX_SKIPPED_IN_A_ROW:
            since = f"{self.num_skipped} steps in a row"
        elif step == self._config.train.steps and self._num_unusual >= at_the_end:
            since = "the last step" if self.num_skipped == 1 else f"the last {self.num_skipped} steps"
        else:
            return
        began = "" if first is None else f"It began in step {first[0]}: {first[1]}. "
        raise NumbersError(
            f"step {step}: the loss or the gradient was not finite in {since}, and nothing was learned. {began}"
            f"What helps: {self._advice()}"
        )

    def _advice(self) -> str:
        train, lr = self._config.train, self._config.optimizer.lr
        diagnosis = None if self._first is None else self._first[2]
        if diagnosis is not None and _is_in_weights(diagnosis):
            return (
                "no later step can be finite. The newest checkpoint is from before, and the same command goes on from "
                f"it: lower optimizer.lr={lr:g} first"
            )
        fault = None if diagnosis is None else diagnosis.fault
        if fault is not None and fault.place.layer_idx == 0 and fault.place.what.startswith("the input"):
            return "correct the data, which hold it"
        if diagnosis is not None and fault is None and diagnosis.norm_is_finite:
            return "look for errors of memory and devices in the logs of the machines, and start the same command again"
        ways = [f"lower optimizer.lr={lr:g}", f"lengthen scheduler.warmup_steps={self._config.scheduler.warmup_steps}"]
        if not train.gradient_clipping:
            ways.append("set train.gradient_clipping=1.0")
        if self._precision == "fp16":
            ways.append("train in bf16 or fp32")
        return f"{', '.join(ways[:-1])} or {ways[-1]}; where that changes nothing, look at the layer that is named"


def _is_in_weights(diagnosis: Diagnosis) -> bool:
    return diagnosis.fault is not None and diagnosis.fault.place.kind == "weight"


def _describe(diagnosis: Diagnosis) -> str:
    if diagnosis.fault is not None:
        return f"the first number that is not finite is in {diagnosis.fault}"
    if not diagnosis.norm_is_finite:
        return "every number of the gradient is finite, and its norm is too large for fp32"
    return "computed again, all is finite: a fault of the moment, and on which rank cannot be known"
