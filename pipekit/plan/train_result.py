"""The outcome of a run, read from its folder: losses and other metrics by step, and its newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipekit.checkpoint.manifest import find_latest
from pipekit.errors import CheckpointError
from pipekit.plan.run_folder import RunFolder, read_records
from pipekit.storage import storing


@dataclass(frozen=True)
class Series:
    """A metric over the steps of a run. It unpacks into both arrays: `plt.plot(*result.losses)`.

    Attributes:
        steps: the steps after which it was measured, int64 `(N,)`.
        values: what was measured, float64 `(N,)`.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __iter__(self) -> Iterator[NDArray[np.int64] | NDArray[np.float64]]:
        return iter((self.steps, self.values))

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run, of which the starts before the last are a part.

    Attributes:
        run_dir: the run's folder.
        step: the last step of which there are metrics; 0 where there are none.
        metrics: everything that `metrics.jsonl` holds, by the metric's name; a number that is not finite is nan.
        checkpoint: the newest checkpoint; None where there is none.
        seconds: time that the training took, from the call to its end; 0 where the result was only read.
    """

    run_dir: Path
    step: int
    metrics: Mapping[str, Series]
    checkpoint: Path | None
    seconds: float = 0.0

    @property
    def losses(self) -> Series:
        """The training loss of each step; empty where a trial reports none."""
        return self._series("loss")

    @property
    def validation_losses(self) -> Series:
        """The mean loss of the held-out samples after each evaluation; empty without evaluations."""
        return self._series("val_loss")

    def _series(self, name: str) -> Series:
        return self.metrics.get(name, Series(np.empty(0, np.int64), np.empty(0)))

    @classmethod
    def read(cls, run_dir: str | Path, *, seconds: float = 0.0) -> TrainResult:
        """Read the outcome of a run that has ended, or of one that goes on, so far.

        Args:
            run_dir: the run's folder.
            seconds: see the attribute.

        Raises:
            StorageError: if its files cannot be read.
        """
        folder = RunFolder(run_dir)
        found: dict[str, tuple[list[int], list[float]]] = {}
        last = 0
        with storing(folder.metrics, doing="read"):
            records = read_records(folder.metrics) if folder.metrics.is_file() else []
        for _, record in records:
            last = max(last, record["step"])
            step = record.pop("step")
            for name, value in record.items():
                if value is None or isinstance(value, (int, float)):
                    if name not in found:
                        found[name] = ([], [])
                    steps, values = found[name]
                    steps.append(step)
                    values.append(np.nan if value is None else value)
        checkpoint = None
        with suppress(CheckpointError, OSError):
            checkpoint = find_latest(folder.checkpoints)
        metrics = {
            name: Series(np.array(steps, np.int64), np.array(values, np.float64))
            for name, (steps, values) in found.items()
        }
        return cls(folder.path, last, metrics, checkpoint, seconds)
