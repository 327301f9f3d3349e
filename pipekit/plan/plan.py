"""The plan of a run: every decision as plain data, and its JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pipekit.config import BatchPlan, Config, parse_config
from pipekit.errors import ConfigError
from pipekit.layout import Layout
from pipekit.predictions.devices import MatmulFormat
from pipekit.predictions.elements import Precision
from pipekit.schedules import Action, Schedule

Device = Literal["cpu", "cuda"]

_FORMAT, _VERSION = "pipekit-plan", 1


@dataclass(frozen=True)
class StartPoint:
    """The checkpoint that a run goes on from.

    Attributes:
        checkpoint: its folder.
        step: updates made in it.
        warning: the reason why it is not the newest; empty where it is.
    """

    checkpoint: Path
    step: int
    warning: str = ""


@dataclass(frozen=True)
class Plan:
    """Every decision of a run, the same on every rank.

    Attributes:
        config: the configuration with every size and degree known, as the run folder stores it.
        device: kind of device that computes.
        precision: number format of weights and activations.
        layout: the grid of ranks.
        batch: how a step's sequences are divided among ranks and micro-batches.
        layer_names: logical name of each layer.
        layer_parameters: trainable parameters of each layer; a tied layer's wherever it occurs.
        num_parameters: trainable parameters of the model, tied ones once.
        stage_parameters: trainable parameters of each stage on one tensor-parallel rank.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        schedule: the pipeline's table; under `auto` the one for equal costs, with which a run begins.
        num_threads: CPU threads of each process.
        start: the checkpoint to go on from; None where the run starts anew.
        chosen: under `parallel: auto`, the layout and by how much it is ahead of the next.
        prepared: plain data that the trial's `prepare` returned.
        sequence_flops: floating-point operations of a sequence, see `pipekit.costs.sequence_flops`; None where they are
            not known.
    """

    config: Config
    device: Device
    precision: Precision
    layout: Layout
    batch: BatchPlan
    layer_names: tuple[str, ...]
    layer_parameters: tuple[int, ...]
    num_parameters: int
    stage_parameters: tuple[int, ...]
    boundaries: tuple[int, ...]
    schedule: Schedule
    num_threads: int = 1
    start: StartPoint | None = None
    chosen: str | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    sequence_flops: tuple[float, float] | None = None

    @property
    def matmul_format(self) -> MatmulFormat:
        """Number format of its matrix products on GPUs."""
        return "tf32" if self.config.train.tf32 and self.precision == "fp32" else self.precision

    @property
    def placement(self) -> tuple[int, ...]:
        """The pipeline rank of each stage."""
        return self.schedule.placement

    @property
    def stages(self) -> list[range]:
        """The layers of each stage."""
        return [range(start, end) for start, end in pairwise(self.boundaries)]

    def to_json(self) -> str:
        """JSON text from which `from_json` makes an equal plan.

        Raises:
            ConfigError: if the trial has prepared something that JSON cannot hold.
        """
        stored = {
            "format": _FORMAT,
            "version": _VERSION,
            **vars(self),
            "config": self.config.model_dump(mode="json"),
            "layout": asdict(self.layout),
            "batch": asdict(self.batch),
            "schedule": {
                "name": self.schedule.name,
                "num_micro_batches": self.schedule.num_micro_batches,
                "ranks": [" ".join(map(str, actions)) for actions in self.schedule.ranks],
            },
            "start": self.start and {**asdict(self.start), "checkpoint": str(self.start.checkpoint)},
        }
        try:
            return json.dumps(stored, indent=1) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"run.trial={self.config.run.trial}: prepare returned something that JSON cannot hold ({error}); "
                "return a dict of numbers, texts, lists and dicts"
            ) from None

    @classmethod
    def from_json(cls, text: str, *, where: str = "plan") -> Plan:
        """Parse a stored plan.

        Raises:
            ConfigError: if `text` is not the plan of a run by this version of pipekit.
        """
        try:
            stored = json.loads(text)
            if (stored.pop("format"), stored.pop("version")) != (_FORMAT, _VERSION):
                raise ValueError("another format or version")
            layout, schedule, start = stored["layout"], stored["schedule"], stored["start"]
            made = {
                "config": parse_config(stored["config"]),
                "layout": Layout(**{**layout, "order": tuple(layout["order"])}),
                "batch": BatchPlan(**stored["batch"]),
                "schedule": Schedule(
                    schedule["name"],
                    schedule["num_micro_batches"],
                    tuple(tuple(map(Action.parse, row.split())) for row in schedule["ranks"]),
                ),
                "start": start and StartPoint(Path(start["checkpoint"]), start["step"], start["warning"]),
            }
            lists = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
            return cls(**{**stored, **lists, **made})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{where}: is not the plan of a run ({type(error).__name__}: {error})") from None
