"""Trials of layer lists: a model as a list of layers, with its loss and its data."""

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
"""Function `metric(outputs, labels)` of one micro-batch of an evaluation; returns a scalar."""


class LayersTrial:
    """Trial of a list of layers: the model, the data, the loss and the optimizer of a run of `pipekit train`.

    `prepare` and `resolve` run once per run, in the process that plans it. `build_layers` runs there and on every rank,
    and all other methods run on the ranks.

    Args:
        context: this rank's view of the run.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context

    @classmethod
    def prepare(cls, config: Config, on_progress: ProgressCallback | None = None) -> dict[str, Any]:
        """Do work that is needed once before training, such as preparing data.

        Returns:
            Plain data that JSON can hold; `resolve` takes it, and all ranks read it as `context.plan.prepared`.
        """
        return {}

    @classmethod
    def resolve(cls, config: Config, prepared: Mapping[str, Any]) -> Config:
        """Return the configuration with the sizes that follow from the prepared data."""
        return config

    @classmethod
    def build_layers(cls, config: Config) -> list[LayerSpec]:
        """Return the model as a list of layer specs."""
        raise NotImplementedError(f"{cls.__name__}.build_layers must return the model's list of LayerSpec")

    @classmethod
    def build_mpu(cls, layout: Layout, *, placement: Sequence[int], timeout_s: float) -> ModelParallelUnit:
        """Build the process groups of the run, with this rank's place in them. All ranks call this together.

        It may return a subclass of `ModelParallelUnit` that answers some questions differently. The answers of all
        ranks are compared before anything is built, so a mistake is one error on all ranks.

        Args:
            layout: the grid of ranks.
            placement: the pipeline rank of each stage.
            timeout_s: longest wait in any of the groups.
        """
        return ModelParallelUnit(layout, placement=placement, timeout_s=timeout_s)

    @classmethod
    def example(cls, config: Config, micro_batch_size: int) -> Example | None:
        """Example inputs and labels of one micro-batch, used to estimate the costs of layers before a run.

        Only `pipekit plan` and the partitions `flops`, `profile` and `memory` need it.
        """
        return None

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """Return the scalar loss of the last layer's outputs; called on the last stage."""
        raise NotImplementedError(f"{type(self).__name__}.loss must return a scalar tensor")

    def loss_weight(self, labels: Any) -> Tensor | None:
        """Weight of a micro-batch in the mean loss of the global batch, as a scalar tensor.

        None gives all micro-batches the same weight; return it for all of them or for none. If micro-batches differ in
        the number of labels that count in the loss, return that number: the loss and the gradient are then means over
        all labels of the batch.
        """
        return None

    def build_train_dataset(self) -> MapDataset:
        """Build the dataset of training samples, pairs of inputs and labels; called on the first and the last stage.

        A background thread reads the samples one step ahead.
        """
        raise NotImplementedError(f"{type(self).__name__}.build_train_dataset must return a map-style dataset")

    def build_mixture(self, dataset: MapDataset) -> Mixture | None:
        """Mixture of several sources, whose samples follow one another in the dataset.

        None reads all samples in each epoch, in a new order if `data.shuffle` is true.
        """
        return None

    def build_validation_dataset(self) -> MapDataset | Mapping[str, MapDataset] | None:
        """Build the dataset of held-out samples, or a dict of one per named source; None if there are none."""
        return None

    def build_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Build the torch optimizer of this rank's parameters."""
        return build_optimizer(self.context.config.optimizer, parameters)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` updates."""
        config = self.context.config
        return checked_rate(self._rates[0](step), step, config)

    def momentum(self, step: int) -> float | None:
        """Return the momentum of the update that follows `step` updates; None keeps the optimizer's momentum."""
        return self._rates[1](step)

    @cached_property
    def _rates(self) -> tuple[Callable[[int], float], Callable[[int], float | None]]:
        return bind_schedule(self.context.config)

    def validation_metrics(self) -> Mapping[str, Metric]:
        """Metrics of an evaluation besides the loss, by name; each is averaged and reported as `val_<name>`."""
        return {}

    def build_callbacks(self) -> list[TrialCallback]:
        """Build callbacks to add to the shipped ones; they are called only on the rank that reports."""
        return []

    @property
    def data_fingerprint(self) -> str:
        """Hash of the training data, which a resumed run compares with that of its checkpoint; empty if unknown."""
        return ""

    @property
    def tokenizer_file(self) -> Path | None:
        """Path of the tokenizer's `tokenizer.json`, which is copied into checkpoints; None without a tokenizer."""
        return None
