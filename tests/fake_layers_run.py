"""Runs of layers with an engine that computes nothing, for tests of their loop."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipekit.checkpoint.manifest import TrainingState
from pipekit.config import Config, parse_config
from pipekit.data.collate import MapDataset
from pipekit.engine.late_number import LateNumber
from pipekit.engine.step_trace import Diagnosis
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import StorageError
from pipekit.hangs.activity import Activity
from pipekit.layers.specs import LayerSpec
from pipekit.models import build_layers
from pipekit.plan.decide import decide_run
from pipekit.plan.resources import Resources
from pipekit.plan.run_folder import RunFolder
from pipekit.training import layers_run, numbers_watch
from pipekit.training.layers_run import LayersRun
from pipekit.training.layers_trial import LayersTrial, Metric
from pipekit.training.run_context import RunContext
from pipekit.training.trial_callbacks import TrialCallback
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
        self.executor: Any = SimpleNamespace(total_weight=None)
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
        self.batch_size = 4
        self._norms = norms

    def train_micro_batch_size_per_gpu(self) -> int:
        return 2

    def gradient_accumulation_steps(self) -> int:
        return 2

    def train_batch_size(self) -> int:
        return self.batch_size

    def set_train_batch_size(self, train_batch_size: int) -> None:
        self.batch_size = train_batch_size

    def set_lr(self, lr: float, momentum: float | None = None) -> None:
        self.rates.append(lr)

    def train_batch(self, batches: Iterator[Any]) -> Tensor:
        self.trained.append([int(sample) for inputs, _ in batches for sample in inputs])
        self.skipped_steps += not math.isfinite(self._norm)
        return torch.tensor(10.0 - len(self.trained))

    def eval_batch(self, batches: Iterator[Any], *, num_micro_batches: int, observe: Any) -> Tensor:
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
