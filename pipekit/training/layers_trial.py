"""The short way to a trial: a list of layers, their loss and their data. The shipped one trains a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.config import Config
from pipekit.costs.example import Example
from pipekit.data.collate import MapDataset
from pipekit.data.mixture import Mixture
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.layers.specs import LayerSpec
from pipekit.layout import Layout
from pipekit.progress import ProgressCallback
from pipekit.training.optimizer import build_optimizer
from pipekit.training.rates import bind_schedule, checked_rate
from pipekit.training.run_context import RunContext
from pipekit.training.trial_callbacks import TrialCallback

Metric = Callable[[Any, Any], Tensor]
"""Called as `metric(outputs, labels)` on one micro-batch of an evaluation; returns a scalar."""


class LayersTrial:
    """Trial of a list of layers: the model, the data, the loss and the optimizer of a run of `pipekit train`.

    `prepare` and `resolve` run once for a run, where it is planned; `build_layers` there and on every rank; everything
    else on the ranks.

    Args:
        context: this rank's view of the run.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context

    @classmethod
    def prepare(cls, config: Config, on_progress: ProgressCallback | None = None) -> dict[str, Any]:
        """Do what must be done once before training, such as preparing data.

        Returns:
            Plain data, of the kinds that JSON knows, for `resolve`, and for all ranks as `context.plan.prepared`.
        """
        return {}

    @classmethod
    def resolve(cls, config: Config, prepared: Mapping[str, Any]) -> Config:
        """Return the configuration with the sizes that follow from what was prepared."""
        return config

    @classmethod
    def build_layers(cls, config: Config) -> list[LayerSpec]:
        """Return the model."""
        raise NotImplementedError(f"{cls.__name__}.build_layers must return the model's list of LayerSpec")

    @classmethod
    def build_mpu(cls, layout: Layout, *, placement: Sequence[int], timeout_s: float) -> ModelParallelUnit:
        """Return the process groups of the run, and this rank's place in them. Every rank calls this together.

        A subclass of `ModelParallelUnit` may answer otherwise than it does. The answers of all ranks are compared
        before anything is built, so that a mistake is one error on all of them.

        Args:
            layout: the grid of ranks.
            placement: the pipeline rank of each stage.
            timeout_s: no wait in one of its groups lasts longer.
        """
        return ModelParallelUnit(layout, placement=placement, timeout_s=timeout_s)

    @classmethod
    def example(cls, config: Config, micro_batch_size: int) -> Example | None:
        """Example inputs and labels of one micro-batch, from which the costs of layers are described before a run.

        Only `pipekit plan` and partitions by `flops`, `profile` and `memory` ask for it.
        """
        return None

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """Return the scalar loss of the last layer's outputs, on the last stage."""
        raise NotImplementedError(f"{type(self).__name__}.loss must return a scalar tensor")

    def loss_weight(self, labels: Any) -> Tensor | None:
        """Return the weight of a micro-batch in the mean loss of the global batch, a scalar, by its labels.

        None counts all micro-batches alike, and then does so for each. Return the number of labels in the loss where
        that differs between micro-batches: then the loss and the gradient are means over all labels of the batch.
        """
        return None

    def build_train_dataset(self) -> MapDataset:
        """Return the training samples: pairs of inputs and labels. Called on the first and the last stage.

        Samples are read on a thread of their own, one step ahead.
        """
        raise NotImplementedError(f"{type(self).__name__}.build_train_dataset must return a map-style dataset")

    def build_mixture(self, dataset: MapDataset) -> Mixture | None:
        """Return the mixture of several sources, whose samples stand in the dataset one after the other.

        None goes through all samples in an order of their own in each epoch.
        """
        return None

    def build_validation_dataset(self) -> MapDataset | Mapping[str, MapDataset] | None:
        """Return the held-out samples, those of several sources by their names, or None where there are none."""
        return None

    def build_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the torch optimizer of this stage's parameters."""
        return build_optimizer(self.context.config.optimizer, parameters)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update after `step` updates."""
        config = self.context.config
        return checked_rate(self._rates[0](step), step, config)

    def momentum(self, step: int) -> float | None:
        """Return the momentum of the update after `step` updates; None leaves the optimizer's own."""
        return self._rates[1](step)

    @cached_property
    def _rates(self) -> tuple[Callable[[int], float], Callable[[int], float | None]]:
        return bind_schedule(self.context.config)

    def validation_metrics(self) -> Mapping[str, Metric]:
        """Metrics to evaluate beside the loss; each is averaged and reported as `val_<name>`."""
        return {}

    def build_callbacks(self) -> list[TrialCallback]:
        """Return callbacks beside the shipped ones, which are called on the rank that reports, and on no other."""
        return []

    @property
    def data_fingerprint(self) -> str:
        """Hash of the training data, by which a resumed run can check that they are the same; empty if unknown."""
        return ""

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer's `tokenizer.json`, which checkpoints carry along; None where there is none."""
        return None
