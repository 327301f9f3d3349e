"""Linear layers with the initial weights of a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

LinearLayer = TypeVar("LinearLayer", bound=nn.Linear)


def build_linear(kind: Callable[..., LinearLayer], *args: Any, std: float, **kwargs: Any) -> LinearLayer:
    """Linear layer with normal weights of standard deviation `std` and a bias of zero."""
    # Without nn.Linear's own initial weights, which would be drawn only to be replaced.
    with torch.device("meta"):
        linear = kind(*args, **kwargs)
    linear.to_empty(device=torch.get_default_device())
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
