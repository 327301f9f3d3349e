"""Model FLOPs: floating-point operations of a model for a sequence, and the peak of a device, for MFU.

Source: Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", appendix B, for model FLOPs utilization.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

import torch

from pipekit.errors import ConfigError
from pipekit.predictions.devices import MatmulFormat, find_device
from pipekit.predictions.layer_costs import ModelCosts

SequenceFlops = tuple[float, float]
"""`(a, b)`, by which a sequence of S tokens takes `a * S + b * S**2` operations."""


def model_flops(costs: ModelCosts) -> int:
    """Operations of the forward and the backward of a micro-batch, without those of activation checkpointing.

    Layers before the first that is trained need no backward.
    """
    layers = [*costs.layers, *([] if costs.loss is None else [costs.loss])]
    frozen = len(list(takewhile(lambda layer: not layer.parameters, costs.layers)))
    if frozen == len(costs.layers):  # a model without parameters: of inputs that are differentiated
        frozen = 0
    return sum(layer.forward_flops if index < frozen else layer.flops for index, layer in enumerate(layers))


def fit_sequence_flops(costs_of: Callable[[int], ModelCosts], lengths: set[int], num_sequences: int) -> SequenceFlops:
    """Operations of a sequence of any length: products of weights grow with it, those of attention with its square.

    Args:
        costs_of: costs of a micro-batch of sequences of so many tokens.
        lengths: one length, where all sequences have it, or two to interpolate between.
        num_sequences: sequences in the micro-batch.

    Raises:
        ConfigError: if a layer cannot be described.
    """
    first, *others = sorted(lengths)
    per_token = {length: model_flops(costs_of(length)) / num_sequences / length for length in lengths}
    slope = (per_token[others[-1]] - per_token[first]) / (others[-1] - first) if others else 0.0
    return per_token[first] - slope * first, slope


def flops_of(sequence_flops: SequenceFlops, length: int) -> float:
    """Operations of a sequence of so many tokens.

    Example:
        >>> flops_of((10.0, 2.0), 4)
        72.0
    """
    linear, quadratic = sequence_flops
    return linear * length + quadratic * length**2


def show_flops_per_s(per_s: float) -> str:
    """Return a speed for people.

    Example:
        >>> show_flops_per_s(6.28e9), show_flops_per_s(4.1e14)
        ('6.28 GFLOP/s', '410 TFLOP/s')
    """
    return f"{per_s / 1e12:.3g} TFLOP/s" if per_s >= 1e11 else f"{per_s / 1e9:.3g} GFLOP/s"


def device_peak_flops(device: torch.device, matmul_format: MatmulFormat) -> float | None:
    """Published peak of a GPU in floating-point operations per second; None where none is known, and for CPUs."""
    if device.type != "cuda":
        return None
    try:
        peak: float = getattr(find_device(torch.cuda.get_device_name(device)).peak_flops, matmul_format)
    except ConfigError:
        return None
    return peak
