"""The gradients of a whole step, as every engine has them just before its update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from pipekit.engine.zero_engine import ZeroEngine
from pipekit.engine.training_engine import TrainingEngine

GradientOf = Callable[[nn.Parameter], Tensor | None]
"""Returns the gradient of a parameter; None where it has none. All data-parallel ranks call it together."""


def call_before_update(engine: TrainingEngine, call: Callable[[GradientOf], None]) -> None:
    """Have an engine call something before every update, when the gradients are those of the step and of all replicas.

    Args:
        engine: any of the engines.
        call: called with what returns the gradient of a parameter, in fp32 or the parameter's own type; of what
            tensor-parallel ranks share out, this rank's part.
    """
    if isinstance(engine, ZeroEngine):

        def call_at_boundary() -> None:
            if engine.is_gradient_accumulation_boundary():
                call(safe_get_full_grad)

        _call_first(engine, "step", call_at_boundary)
    else:
        _call_first(engine.view, "hand_over_gradients", lambda: call(engine.view.gradient))


def _call_first(owner: Any, name: str, call: Callable[[], Any]) -> None:
    method = getattr(owner, name)

    def first(*args: Any, **kwargs: Any) -> Any:
        call()
        return method(*args, **kwargs)

    setattr(owner, name, first)
