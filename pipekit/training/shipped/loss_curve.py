"""Loss curve: a picture of the metrics over the batches, in the run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipekit.config.callbacks_config import LossCurveConfig
from pipekit.errors import ConfigError
from pipekit.plan.run_folder import read_records
from pipekit.storage import storage_error
from pipekit.training.shipped.shipped_callback import ShippedCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext

_INTERVAL_S = 30.0
_logger = logging.getLogger(__name__)


class LossCurve(ShippedCallback):
    """Callback that draws metrics with matplotlib after validations and checkpoints, and at the end of the run.

    Args:
        context: context of the trial.
        settings: the file, and the metrics.
    """

    def __init__(self, context: TrialContext, settings: LossCurveConfig | None = None) -> None:
        super().__init__(context)
        self.settings = settings or LossCurveConfig()
        if find_spec("matplotlib") is None:
            raise ConfigError(
                "callbacks.loss_curve: matplotlib is not installed; run pip install 'pipekit[plot]', or leave it out"
            )
        self._drawn_s = time.monotonic()

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        self._draw_now_and_then()

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        self._draw_now_and_then()

    def on_trial_shutdown(self) -> None:
        self._draw()

    def _draw_now_and_then(self) -> None:
        if time.monotonic() - self._drawn_s > _INTERVAL_S:
            self._draw()

    def _draw(self) -> None:
        folder = self.context.folder
        if not self.is_first or not folder.metrics.is_file():
            return
        curves = read_curves(folder.metrics, self.settings.metrics)
        try:
            if curves:
                draw_curves(folder.path / self.settings.file, curves)
        except OSError as error:
            # It is drawn again later.
            _logger.warning("%s", storage_error(error, folder.path / self.settings.file))
        self._drawn_s = time.monotonic()


def read_curves(path: Path, names: Sequence[str] | None = None) -> dict[str, tuple[list[int], list[float]]]:
    """Return the steps and values of metrics in a `metrics.jsonl`; values that are not finite are left out.

    Args:
        path: the file.
        names: the metrics; None takes those with "loss" in their names, or all if there are none.
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for _, record in read_records(path):
        step = record.pop("step")
        for name, value in record.items():
            if isinstance(value, (int, float)):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    chosen = names if names is not None else [name for name in curves if "loss" in name] or list(curves)
    return {name: curves[name] for name in chosen if name in curves}


def draw_curves(path: Path, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    """Draw values over steps as a picture, with a line for each name; SVG or PNG, by the suffix of `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (steps, values) in curves.items():
        # One point is no line.
        axes.plot(steps, values, label=name, gid=name, marker="o" if len(steps) < 20 else "", markersize=3)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    # A reader never sees half a picture.
    unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(unfinished, dpi=110, metadata=metadata)
    unfinished.replace(path)
