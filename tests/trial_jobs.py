"""A trial that tests train, on a plain module, and the jobs of its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.data import DataLoader
from pipekit.training.context import TrialContext
from pipekit.training.trainer import Trainer
from pipekit.training.trial import Trial
from pipekit.training.trial_callbacks import TrialCallback

ENGINES: list[Any] = []
"""Engines of trials in this process, also of those whose constructor failed."""

NUM_SAMPLES, MICRO_BATCH, ACCUMULATION, FEATURES = 22, 2, 3, 4


class Points:
    """Samples `(number, features (4,), target (1,))`."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        # The noise is drawn from torch's global generator, as augmentations do.
        features = torch.sin(torch.arange(FEATURES) * (index + 1.0)) + 0.01 * torch.randn(FEATURES)
        return index, features, features.sum(0, keepdim=True)


class Seen(TrialCallback):
    """Notes every event, and counts batches in a state that checkpoints hold."""

    def __init__(self, trial: PointsTrial) -> None:
        self.trial = trial
        self.events: list[str] = []
        self.losses: list[float] = []
        self.validations: list[dict[str, Any]] = []
        self.num_reports = 0

    def note(self, event: str) -> None:
        self.events.append(f"{event} at {self.trial.num_batches}")

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        self.note(f"trial_startup {first_batch_idx} {checkpoint_uuid}")

    def on_trial_shutdown(self) -> None:
        self.note("trial_shutdown")

    def on_training_start(self) -> None:
        self.note("training_start")

    def on_training_epoch_start(self, epoch_idx: int) -> None:
        self.note(f"epoch_start {epoch_idx}")

    def on_training_epoch_end(self, epoch_idx: int) -> None:
        self.note(f"epoch_end {epoch_idx}")

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list[dict[str, float]]) -> None:
        self.note("workload_end")
        self.num_reports += 1
        self.losses += [metrics["loss"] for metrics in batch_metrics]

    def on_validation_start(self) -> None:
        self.note("validation_start")

    def on_validation_epoch_start(self) -> None:
        self.note("validation_epoch_start")

    def on_validation_epoch_end(self, outputs: list[dict[str, float]]) -> None:
        self.note(f"validation_epoch_end {len(outputs)}")

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        self.note("validation_end")
        self.validations.append(metrics)

    def on_checkpoint_load_start(self, checkpoint: dict[str, Any]) -> None:
        self.note(f"load_start {checkpoint}")

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        self.note("save_start")
        checkpoint["note"] = "kept"

    def on_checkpoint_write_end(self, checkpoint_dir: str) -> None:
        self.note(f"write_end {sorted(path.name for path in Path(checkpoint_dir).iterdir())}")

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        self.note(f"upload_end {uuid}")

    def state_dict(self) -> dict[str, Any]:
        return {"num_reports": self.num_reports}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_reports = state_dict["num_reports"]


class PointsTrial(Trial):
    """Fits a plain module with dropout to points; hyperparameters change what it is made of."""

    def __init__(self, context: TrialContext) -> None:
        import pipekit

        self.context = context
        hparams = context.get_hparams()
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        config = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": hparams.get("accumulation", ACCUMULATION),
            "steps_per_print": None,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": hparams.get("zero", 1), "stage3_param_persistence_threshold": 0},
        }
        engine, *_ = pipekit.initialize(model=model, config=config)
        ENGINES.append(engine)
        self.engine = context.wrap_model_engine(engine)
        self.seen = Seen(self)
        self.read: list[list[int]] = []
        self.num_batches = 0

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        assert dataloader_iter is not None
        numbers, features, targets = self.context.to_device(next(dataloader_iter))
        self.read.append([epoch_idx, *numbers.tolist()])
        loss = F.mse_loss(self.engine(features), targets)
        self.engine.backward(loss)
        self.engine.step()
        self.num_batches = batch_idx + 1
        return loss

    def evaluate_batch(self, dataloader_iter: Iterator[Any] | None, batch_idx: int) -> dict[str, Any]:
        assert dataloader_iter is not None
        _, features, targets = next(dataloader_iter)
        return {"error": F.mse_loss(self.engine(features), targets)}

    def build_training_data_loader(self) -> DataLoader:
        workers = self.context.get_hparams().get("workers", 0)
        # Ranks of tests come from a fork server, whose children would start workers as new interpreters.
        way = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
        return DataLoader(Points(), batch_size=MICRO_BATCH, shuffle=True, **way)

    def build_validation_data_loader(self) -> DataLoader:
        return DataLoader(Points(5), batch_size=MICRO_BATCH)

    def build_callbacks(self) -> dict[str, TrialCallback]:
        return {"seen": self.seen}


def make_trial(folder: str | Path, kind: type[Trial] = PointsTrial, **hparams: Any) -> Any:
    """Build a trial in this process."""
    config = {"hyperparameters": hparams, "run": {"dir": str(folder), "device": "cpu"}}
    context = TrialContext.from_config(config)
    return kind(context)


def destroy_engines() -> None:
    """End the engines of this process's trials, with their process groups."""
    while ENGINES:
        ENGINES.pop().destroy()


def fit(trial: Any, **arguments: Any) -> Any:
    """Train a trial."""
    return Trainer(trial, trial.context).fit(**arguments)


class PipelineTrial(PointsTrial):
    """Fits a pipeline module to the same points; `pp` and `tp` are its degrees, and replicas fill the processes."""

    def __init__(self, context: TrialContext) -> None:
        import pipekit

        self.context = context
        hparams = context.get_hparams()
        pp, tp = hparams.get("pp", 1), hparams.get("tp", 1)
        unit = pipekit.ModelParallelUnit(pipekit.Layout(pp=pp, tp=tp, dp=context.distributed.size // (pp * tp)))
        context.set_mpu(unit)
        module = pipekit.PipelineModule(
            [
                pipekit.LayerSpec(nn.Linear, FEATURES, 8),
                pipekit.LayerSpec(nn.Dropout, 0.2),
                pipekit.LayerSpec(nn.Tanh),
                pipekit.LayerSpec(nn.Linear, 8, 1),
            ],
            loss_fn=F.mse_loss,
            mpu=unit,
            partition_method="uniform",
            schedule=hparams.get("schedule", "1f1b"),
            device="cpu",
        )
        config = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "steps_per_print": None,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
        }
        engine, *_ = pipekit.initialize(model=module, config=config)
        self.engine = context.wrap_model_engine(engine)
        self.evaluated = context.wrap_reducer(count_and_sum, for_training=False)
        self.seen = Seen(self)
        self.read: list[list[int]] = []
        self.num_batches = 0

    def pairs(self, dataloader_iter: Iterator[Any] | None, numbers: list[list[int]]) -> Iterator[Any] | None:
        """Pairs of inputs and labels, the numbers of whose samples are noted."""
        if dataloader_iter is None:
            return None

        def note(batch: Any) -> tuple[Tensor, Tensor]:
            numbers.append(batch[0].tolist())
            return batch[1], batch[2]

        return map(note, dataloader_iter)

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        loss = self.engine.train_batch(self.pairs(dataloader_iter, self.read))
        self.num_batches = batch_idx + 1
        return {"loss": loss, "batch": batch_idx}

    def evaluate_batch(self, dataloader_iter: Iterator[Any] | None, batch_idx: int) -> dict[str, Any]:
        micro_batches: list[list[int]] = []
        loss = self.engine.eval_batch(self.pairs(dataloader_iter, micro_batches))
        for numbers in micro_batches:
            for number in numbers:
                self.evaluated.update(number)
        return {"error": loss}

    def build_validation_data_loader(self) -> DataLoader:
        return DataLoader(Points(12), batch_size=MICRO_BATCH)


def count_and_sum(numbers: list[int]) -> dict[str, float]:
    """The number of values, and their sum."""
    return {"count": len(numbers), "sum": sum(numbers)}
