"""Results of a run, read from its folder: losses and other metrics by step, and the newest checkpoint."""

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
    """A metric over the steps of a run. It unpacks into two arrays: `plt.plot(*result.losses)`.

    Attributes:
        steps: steps after which the metric was measured, int64 `(N,)`.
        values: the metric's values, float64 `(N,)`.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __iter__(self) -> Iterator[NDArray[np.int64] | NDArray[np.float64]]:
        return iter((self.steps, self.values))

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class TrainResult:
    """Results of a run, over all its starts.

    Attributes:
        run_dir: the run folder.
        step: the last step that has metrics; 0 if none has.
        metrics: all numbers in `metrics.jsonl`, by metric name; a value that is not finite is nan.
        checkpoint: the newest checkpoint; None if there is none.
        seconds: duration of the call of `train`; 0 if the result was only read.
    """

    run_dir: Path
    step: int
    metrics: Mapping[str, Series]
    checkpoint: Path | None
    seconds: float = 0.0

    @property
    def losses(self) -> Series:
        """Training loss of each step; empty if the trial reports no loss."""
        return self._series("loss")

    @property
    def validation_losses(self) -> Series:
        """Mean loss of the held-out samples in each evaluation; empty without evaluations."""
        return self._series("val_loss")

    def _series(self, name: str) -> Series:
        return self.metrics.get(name, Series(np.empty(0, np.int64), np.empty(0)))

    @classmethod
    def read(cls, run_dir: str | Path, *, seconds: float = 0.0) -> TrainResult:
        """Read the results of a run that has ended, or those so far of a run that is still training.

        Args:
            run_dir: the run folder.
            seconds: see the attribute.

        Raises:
            StorageError: if a file of the run cannot be read.
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
