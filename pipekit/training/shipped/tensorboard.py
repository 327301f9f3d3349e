"""TensorBoard: all metrics as event files in the run folder."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from pipekit.errors import ConfigError
from pipekit.training.shipped.shipped_callback import ShippedCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext


class Tensorboard(ShippedCallback):
    """Callback that switches on the context's TensorBoard writer, to which the trainer then writes all metrics."""

    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        if find_spec("tensorboard") is None:
            raise ConfigError(
                "tensorboard=true: tensorboard is not installed; run pip install 'pipekit[tensorboard]', or "
                "set it to false"
            )
        context.set_enable_tensorboard_logging(True)
