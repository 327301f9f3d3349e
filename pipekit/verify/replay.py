"""The optimizer alone: what it makes, in one process, of the gradients that a layout has recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from pipekit.layers.sequential import SequentialModel
from pipekit.optimizers.table import set_rates
from pipekit.training.optimizer import name_parameters
from pipekit.verify.compare import compare_weights
from pipekit.verify.measurement import TOLERANCE, Measurement
from pipekit.verify.recording import Recording


def compare_updates(
    model: SequentialModel,
    found: Recording,
    *,
    build_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    rates: Sequence[float],
    gradient_clipping: float,
    momenta: Sequence[float | None] = (),
    tolerance: float = TOLERANCE,
) -> Iterator[Measurement]:
    """Update a model with the gradients of a layout, and compare the weights after each step.

    A parameter without a gradient is left out: ZeRO takes it for zero, so that weight decay shrinks the weights, and
    torch's optimizers skip it.

    Args:
        model: the whole model, with its initial weights.
        found: of the layout.
        build_optimizer: called with the trainable parameters.
        rates: learning rate of each step.
        gradient_clipping: largest norm of the gradient; 0 does not clip.
        momenta: momentum of each step, where a schedule gives one.
        tolerance: relative to what has changed.
    """
    parameters = logical_parameters(model)
    initial = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    trainable = [parameter for parameter in name_parameters(parameters.items()) if parameter.requires_grad]
    optimizer = build_optimizer(trainable)
    keys = {(key.step, key.name): key for key in found.keys("gradient")}
    for step, lr in enumerate(rates):
        for name, parameter in parameters.items():
            key = keys.get((step, name))
            parameter.grad = None if key is None else found.load(key).to(parameter)
        momentum = momenta[step] if momenta else None
        make_update(optimizer, trainable, lr=lr, momentum=momentum, gradient_clipping=gradient_clipping)
        for key in found.keys("weights"):
            parameter = parameters[key.name]
            if key.step == step and (parameter.grad is not None or not parameter.requires_grad):
                before, after = initial[key.name], parameter.detach().cpu()
                yield compare_weights(found, key, model.names, before=before, after=after, tolerance=tolerance)


def logical_parameters(model: SequentialModel) -> dict[str, nn.Parameter]:
    """Return every parameter under its logical name."""
    tensors = model.logical_tensors()
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}


def make_update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    *,
    lr: float,
    momentum: float | None = None,
    gradient_clipping: float,
) -> float:
    """Clip the gradient to a norm, 0 for none, and let the optimizer make its update; return the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, gradient_clipping or float("inf"))
    set_rates(optimizer.param_groups, lr, momentum)
    optimizer.step()
    return float(norm)
