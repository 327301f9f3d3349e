"""Loggers stop no training where the disk is full."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipekit.training.loggers import TensorBoardLogger


class Context:
    """Stand-in for the context of a logger; its writers fail while the disk is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_full = False
        self.written: list[tuple[str, float, int]] = []
        self.warnings: list[str] = []
        self.num_writers, self._writer = 0, None

    def get_enable_tensorboard_logging(self) -> bool:
        return True

    def get_tensorboard_path(self) -> Path:
        return self.folder

    def get_tensorboard_writer(self) -> Any:
        if self._writer is None:
            self.num_writers += 1
            self._writer = SimpleNamespace(add_scalar=self._add)
        return self._writer

    def _add(self, *scalar: Any) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written.append(scalar)

    def close(self) -> None:
        self._writer = None

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_tensorboard_lacks_what_did_not_fit_and_goes_on_with_a_new_file(tmp_path: Path) -> None:
    context: Any = Context(tmp_path)
    logger = TensorBoardLogger(context, {})
    for step in range(1, 6):
        context.is_full = step in (2, 3)
        logger.on_metrics(step, {"loss": 1.0})
    assert [step for _, _, step in context.written] == [1, 4, 5]
    assert context.num_writers == 3
    (warning,) = context.warnings
    assert f"{tmp_path}: cannot be written: the disk is full" in warning
    assert warning.endswith("training goes on, and TensorBoard lacks metrics from step 2 on")
