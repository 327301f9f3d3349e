"""Trials as users of Determined write them, with one line changed: the import of `det`."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from torch import nn

import deepspeed
import pipekit.compat.determined as det

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.0,
    "steps_per_print": 1000,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}
NUM_SAMPLES = 24


class PointsDataset(torch.utils.data.Dataset):
    """Features `(4,)` and targets `(1,)`."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.sin(torch.arange(4) * (idx + 1.0))
        return features, features.sum(0, keepdim=True)


class LargestError(det.pytorch.MetricReducer):
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.errors: list[float] = []

    def update(self, errors: torch.Tensor) -> None:
        self.errors += errors.flatten().tolist()

    def per_slot_reduce(self) -> Any:
        return max(self.errors)

    def cross_slot_reduce(self, per_slot_metrics: list[Any]) -> Any:
        return max(per_slot_metrics)


class CountReports(det.pytorch.PyTorchCallback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.num_reports = 0

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list[dict[str, Any]]) -> None:
        self.metrics.append(avg_metrics)
        self.num_reports += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_reports": self.num_reports}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_reports = state_dict["num_reports"]


class PointsTrial(det.pytorch.deepspeed.DeepSpeedTrial):
    def __init__(self, context: det.pytorch.deepspeed.DeepSpeedTrialContext) -> None:
        self.context = context
        self.args = SimpleNamespace(**self.context.get_hparams())
        deepspeed.init_distributed()
        self.ds_config = det.pytorch.deepspeed.overwrite_deepspeed_config(
            self.args.deepspeed_config, self.args.overwrite_deepspeed_args
        )
        self.callback = CountReports()
        self.build_engine()

    def build_engine(self) -> None:
        model = nn.Sequential(nn.Linear(4, self.args.width), nn.Tanh(), nn.Linear(self.args.width, 1))
        parameters = filter(lambda p: p.requires_grad, model.parameters())
        model_engine, _, _, _ = deepspeed.initialize(
            args=self.args, model=model, model_parameters=parameters, config=self.ds_config
        )
        self.model_engine = self.context.wrap_model_engine(model_engine)
        self.context.set_mpu(det.pytorch.deepspeed.make_data_parallel_mpu(self.context.distributed))
        self.reducer = self.context.wrap_reducer(LargestError(), name="largest_error", for_training=False)

    def train_batch(
        self, dataloader_iter: Iterator[det.pytorch.TorchData] | None, epoch_idx: int, batch_idx: int
    ) -> torch.Tensor | dict[str, Any]:
        features, targets = self.context.to_device(next(dataloader_iter))
        loss = nn.functional.mse_loss(self.model_engine(features), targets)
        self.model_engine.backward(loss)
        self.model_engine.step()
        return {"loss": loss.item()}

    def evaluate_batch(self, dataloader_iter: Iterator[det.pytorch.TorchData] | None, batch_idx: int) -> dict[str, Any]:
        features, targets = self.context.to_device(next(dataloader_iter))
        outputs = self.model_engine(features)
        self.reducer.update((outputs - targets).abs())
        return {"loss": nn.functional.mse_loss(outputs, targets)}

    def evaluation_reducer(self) -> det.pytorch.Reducer:
        return det.pytorch.Reducer.AVG

    def build_training_data_loader(self) -> Any:
        return det.pytorch.DataLoader(PointsDataset(), batch_size=self.context.train_micro_batch_size_per_gpu)

    def build_validation_data_loader(self) -> Any:
        return det.pytorch.DataLoader(PointsDataset(), batch_size=self.context.get_train_micro_batch_size_per_gpu())

    def build_callbacks(self) -> dict[str, det.pytorch.PyTorchCallback]:
        return {"count": self.callback}

    def save(self, context: det.pytorch.deepspeed.DeepSpeedTrialContext, path: pathlib.Path) -> None:
        for i, m in enumerate(context.models):
            m.save_checkpoint(path, tag=f"model{i}")

    def load(self, context: det.pytorch.deepspeed.DeepSpeedTrialContext, path: pathlib.Path) -> None:
        for i, m in enumerate(context.models):
            m.load_checkpoint(path, tag=f"model{i}")


class PipelinePointsTrial(PointsTrial):
    def build_engine(self) -> None:
        layers = [nn.Linear(4, self.args.width), lambda x: torch.tanh(x), nn.Linear(self.args.width, 1)]
        model = PipelineModule(
            layers=layers,
            loss_fn=nn.MSELoss(),
            num_stages=self.args.pipe_parallel_size,
            partition_method="parameters",
            activation_checkpoint_interval=0,
        )
        model_engine, _, _, _ = deepspeed.initialize(
            args=self.args,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=self.ds_config,
        )
        self.model_engine = self.context.wrap_model_engine(model_engine)
        self.context.set_mpu(det.pytorch.deepspeed.make_deepspeed_mpu(self.model_engine.mpu))

    def train_batch(self, iter_dataloader: Any, epoch_idx: int, batch_idx: int) -> dict[str, Any]:
        return {"loss": float(self.model_engine.train_batch(iter_dataloader))}

    def evaluate_batch(self, iter_dataloader: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.model_engine.eval_batch(iter_dataloader)}
