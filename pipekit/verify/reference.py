"""Reference run in one process by plain torch, which every layout is compared with.

Micro-batches come one after the other, their gradients are averaged, clipped by `torch.nn.utils.clip_grad_norm_`, and
handed to the user's optimizer. DeepSpeed takes no part, nor does the engine, but for the function that moves a batch
to the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pipekit.data.batch_loader import BatchLoader
from pipekit.data.order import SampleOrder
from pipekit.errors import PipekitError
from pipekit.layers.sequential import SequentialModel
from pipekit.layout import Coordinate
from pipekit.rng import fold_seed
from pipekit.tensors.transfer import to_device
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.optimizer import name_parameters
from pipekit.verify.activation_recorder import ActivationRecorder
from pipekit.verify.recording import Recorder, TensorKey
from pipekit.verify.replay import logical_parameters, make_update


def build_model(trial: LayersTrial) -> SequentialModel:
    """Return the whole model with its initial weights, on the device of the run."""
    return SequentialModel(trial.context.specs, seed=trial.context.config.train.seed).to(trial.context.device)


def record_reference(trial: LayersTrial, folder: Path, *, num_steps: int) -> None:
    """Train some steps in this process alone, and record what every layout is compared with.

    Raises:
        PipekitError: if a loss or a gradient is not finite, so that nothing can be compared.
    """
    train, device = trial.context.config.train, trial.context.device
    recorder = Recorder(folder, rank=0, coordinate=Coordinate(0, 0, 0))
    model = build_model(trial)
    parameters = logical_parameters(model)
    layer_of = {name: model.names.index(layer_of_parameter(name, model.names)) for name in parameters}
    trainable = [parameter for parameter in name_parameters(parameters.items()) if parameter.requires_grad]
    optimizer = trial.build_optimizer(trainable)
    for name, parameter in parameters.items():
        recorder.write(TensorKey("initial weights", 0, layer_of[name], name), parameter)
    dataset = trial.build_train_dataset()
    mixture = trial.build_mixture(dataset)
    loader = BatchLoader(
        dataset,
        SampleOrder(len(dataset), train.seed, shuffle=trial.context.config.data.shuffle)
        if mixture is None
        else mixture.order(batch_size=train.global_batch_size),
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
    )
    losses, norms, rates = [], [], []
    random_layers: dict[str, None] = {}
    model.train()
    for step in range(num_steps):
        record_activations = (
            ActivationRecorder(recorder, num_micro_batches=loader.num_micro_batches(0)) if not step else None
        )
        loss = 0.0
        batches = to_device(loader.step_batches(step * train.global_batch_size), device)
        counts = [trial.loss_weight(labels) for _, labels in batches]
        weights = [1.0 if count is None else float(count) for count in counts]
        shares = [weight / (sum(weights) or 1.0) for weight in weights]
        for micro_batch, (inputs, labels) in enumerate(batches):
            for layer_idx, layer in enumerate(model.steps):
                torch.manual_seed(fold_seed(train.seed, "layer", step, micro_batch, layer_idx))
                before = _generator_states()
                inputs = layer(inputs)
                if not all(map(torch.equal, before, _generator_states())):
                    random_layers[model.names[layer_idx]] = None
                if record_activations is not None:
                    record_activations(layer_idx, inputs, (step, micro_batch))
            share = torch.tensor(shares[micro_batch], device=device)
            # The mean of no label is nan.
            part: Tensor = torch.where(share > 0, trial.loss(inputs, labels) * share, 0.0)
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                recorder.write(TensorKey("gradient", step, layer_of[name], name), parameter.grad)
        lr = trial.learning_rate(step)
        momentum = trial.momentum(step)
        norm = make_update(optimizer, trainable, lr=lr, momentum=momentum, gradient_clipping=train.gradient_clipping)
        optimizer.zero_grad()
        losses.append(loss)
        norms.append(norm)
        rates.append(lr)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise PipekitError(
                f"the loss of step {step + 1} is {loss:g} and the gradient's norm {norm:g}, so that there is nothing "
                "to compare with; lower optimizer.lr, or verify fewer steps (--steps)"
            )
    for name, parameter in parameters.items():
        recorder.write(TensorKey("weights", num_steps - 1, layer_of[name], name), parameter)
    recorder.finish(losses=losses, norms=norms, rates=rates, random_layers=list(random_layers))


def _generator_states() -> list[Tensor]:
    on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.default_generator.get_state(), *on_gpu]


def layer_of_parameter(parameter: str, layer_names: Iterable[str]) -> str:
    """Name of the layer that a parameter belongs to: the longest name that its own begins with."""
    return max((name for name in layer_names if parameter.startswith(f"{name}.")), key=len)
