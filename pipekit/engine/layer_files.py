"""Weights of a pipeline module in a file for each layer, named and made as DeepSpeed names and makes them."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipekit.errors import PipekitError
from pipekit.layers.specs import TiedLayerSpec

if TYPE_CHECKING:
    from pipekit.engine.module import PipelineModule


def save_layers(module: PipelineModule, folder: Path, *, exclude_frozen: bool = False) -> None:
    """Write the weights of each layer of this rank into a file; the first replica writes.

    `engine.save_checkpoint` is what saves a training.

    Args:
        module: this rank's stages.
        folder: is made.
        exclude_frozen: whether to leave out parameters that are not trained.

    Raises:
        PipekitError: under ZeRO-3, where no rank has a whole layer.
    """
    _check_whole(module, "save_state_dict")
    if module.mpu().data_parallel_rank > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for layer_idx in module.layer_indices:
        layer = module.module_of(layer_idx)
        frozen = {name for name, parameter in layer.named_parameters() if not parameter.requires_grad}
        tensors = {
            # A view would bring its whole storage along.
            name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
            for name, value in layer.state_dict().items()
            if not (exclude_frozen and name in frozen)
        }
        torch.save(tensors, _files(module, folder, layer_idx)[0])


def load_layers(module: PipelineModule, folder: Path, *, strict: bool = True) -> None:
    """Read what `save_layers` or DeepSpeed wrote, under any partition; to be called before an engine is built.

    Args:
        module: this rank's stages.
        folder: the folder of the files.
        strict: whether every tensor of a layer must be there, and no other.

    Raises:
        PipekitError: under ZeRO-3, if a layer with weights has no file, or if a file is not of its layer.
    """
    _check_whole(module, "load_state_dir")
    for layer_idx in module.layer_indices:
        layer, spec = module.module_of(layer_idx), module.layer_specs[layer_idx]
        # DeepSpeed writes tied layers only where they have no function.
        same = [
            index
            for index, other in enumerate(module.layer_specs)
            if isinstance(spec, TiedLayerSpec) and isinstance(other, TiedLayerSpec) and other.key == spec.key
        ]
        files = [file for index in (layer_idx, *same) for file in _files(module, folder, index)]
        path = next((file for file in files if file.exists()), None)
        if path is None:
            if layer.state_dict():
                raise PipekitError(f"{files[0]}: no such file, and layer {layer_idx} has weights")
            continue
        try:
            layer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=strict)
        except (RuntimeError, UnpicklingError) as error:
            raise PipekitError(f"{path}: is not of layer {layer_idx}: {error}") from error


def _files(module: PipelineModule, folder: Path, layer_idx: int) -> list[Path]:
    """Return the paths that DeepSpeed may give a layer's file, that under which it is written first."""
    mpu = module.mpu()
    sharded = folder / f"layer_{layer_idx:02d}-model_{mpu.tensor.rank:02d}-model_states.pt"
    return [sharded] if mpu.layout.tp > 1 else [folder / f"layer_{layer_idx:02d}-model_states.pt", sharded]


def _check_whole(module: PipelineModule, function: str) -> None:
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        raise PipekitError(f"{function} needs whole layers, and ZeRO-3 shards them; try engine.save_checkpoint")
