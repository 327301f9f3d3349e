"""Plans for a model whose layers were timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from pipekit.layout import Layout
from pipekit.partitioners import PartitionInputs
from pipekit.predictions.devices import find_device
from pipekit.predictions.layer_costs import ModelCosts
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.partition_inputs import partition_inputs
from pipekit.predictions.prediction import PlannedModel, Prediction, predict
from pipekit.schedules import Schedule, default_stages_per_rank
from pipelines.settings import Precision, Setting


@dataclass(frozen=True)
class ProfiledModel:
    """A model and what its layers cost in one process of one thread.

    Attributes:
        costs: for one micro-batch.
        shapes: of each layer's parameters, by logical name.
        layer_names: logical name of each layer.
        type_names: class name of each layer.
        precision: of weights and activations.
        zero: ZeRO stage of its training.
        sequence_length: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
    """

    costs: ModelCosts
    shapes: Sequence[Mapping[str, tuple[int, ...]]]
    layer_names: Sequence[str]
    type_names: Sequence[str]
    precision: Precision
    zero: int
    sequence_length: int
    micro_batch_size: int

    def predict(self, setting: Setting, schedule: str, boundaries: Sequence[int]) -> Prediction:
        """Return what a step of a schedule takes."""
        return predict(self._planned(), self._plan(setting, schedule), find_device("cpu"), boundaries)

    def partition_inputs(self, setting: Setting, table: Schedule) -> PartitionInputs:
        """Return the inputs of the partitioners under a schedule."""
        return partition_inputs(
            self._planned(),
            self._plan(setting, table.name),
            table,
            type_names=self.type_names,
            limit_bytes=_no_limit,
        )

    def _plan(self, setting: Setting, schedule: str) -> ParallelPlan:
        return ParallelPlan(
            Layout(pp=setting.pp),
            zero=self.zero,
            schedule=schedule,
            stages_per_rank=default_stages_per_rank(schedule),
            micro_batch_size=self.micro_batch_size,
            num_micro_batches=setting.num_micro_batches,
            checkpointing=None,
        )

    def _planned(self) -> PlannedModel:
        return PlannedModel(
            costs_of=lambda micro_batch_size: self.costs,
            shapes_of=lambda tp: self.shapes,
            layer_names=self.layer_names,
            sequence_length=self.sequence_length,
            precision=self.precision,
            is_timed=True,
        )


def _no_limit() -> NoReturn:
    raise AssertionError("no partition here has a limit")
