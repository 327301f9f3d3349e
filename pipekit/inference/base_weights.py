"""The weights that adapters are added to: where they come from, and checkpoints of adapters together with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import WEIGHTS, TensorEntry, resolve_checkpoint
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import Config
from pipekit.errors import CheckpointError, ConfigError
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.layers.lora import LoraTarget, find_targets, is_adapter
from pipekit.models import build_layers, names_in_transformers
from pipekit.models.family import TransformerFamily
from pipekit.tensor_parallel.shards import Shard

BaseWeights = HuggingFaceFolder | CheckpointReader
"""Weights of a model by logical name, in the files of `transformers` or in a checkpoint."""


def open_base(config: Config, *, place: Path | None = None) -> BaseWeights:
    """Open the weights to which the adapters of a configuration are added.

    Args:
        config: the configuration, of which `lora.base` or `model.init_from` names them.
        place: where they are, if that is another place.

    Raises:
        ConfigError: if nothing names them.
        CheckpointError: if they cannot be read, or are adapters themselves.
    """
    model = config.model
    if config.lora.base is not None:
        reader = CheckpointReader(resolve_checkpoint(place or Path(config.lora.base).expanduser()))
        if reader.manifest.training.base:
            raise CheckpointError(
                f"lora.base={config.lora.base}: holds adapters, and not the weights that they are added to; merge both "
                "with pipekit export --merge, and give model.init_from the folder that it writes"
            )
        return reader
    if isinstance(model, TransformerFamily) and model.init_from is not None:
        return HuggingFaceFolder(place or Path(model.init_from).expanduser(), model)
    raise ConfigError(
        f"lora.rank={config.lora.rank}: nothing says which weights the adapters are added to; give "
        "model.init_from=FOLDER of a Hugging Face model, or lora.base=RUN of your own"
    )


def base_record(base: BaseWeights) -> dict[str, str]:
    """Record of the weights that adapters are added to, for their checkpoints."""
    return {"path": str(base.path.resolve()), "fingerprint": base.fingerprint}


def check_base(base: BaseWeights, adapters: CheckpointReader) -> None:
    """Check that weights are those that the adapters of a checkpoint were trained with; a CheckpointError if not."""
    if not adapters.manifest.training.base:
        raise CheckpointError(
            f"{adapters.path}: holds a whole model and no adapters; to add some to it, begin a run of its own with "
            f"lora.base={adapters.path} and another run.dir"
        )
    if base.fingerprint != adapters.manifest.training.base["fingerprint"]:
        raise CheckpointError(
            f"{adapters.path}: its adapters were trained with other weights than those in {base.path}; they were in "
            f"{adapters.manifest.training.base['path']} then: put them back there"
        )


def with_base(reader: CheckpointReader, config: Config) -> CheckpointReader:
    """The checkpoint of a whole model that an open one stands for: itself, or its adapters merged into their base.

    The base is looked for where the configuration says, and then where it was in training.

    Raises:
        CheckpointError: if the base is not there, or not what it was in training.
    """
    record = reader.manifest.training.base
    if not record:
        return reader
    try:
        base = open_base(config)
    except (CheckpointError, ConfigError):
        try:
            base = open_base(config, place=Path(record["path"]))
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(f"{reader.path}: holds adapters, and their base cannot be read: {error}") from None
    check_base(base, reader)
    return MergedReader(reader, base, config)


class MergedReader(CheckpointReader):
    """A checkpoint of adapters, read as one of the model that they make of their base.

    Args:
        adapters: the checkpoint.
        base: the weights that the adapters are added to.
        config: the configuration of the checkpoint.

    Attributes:
        base: the weights that the adapters are added to.
        adapters: the checkpoint.
        targets: the linear layers that have adapters.
    """

    def __init__(self, adapters: CheckpointReader, base: BaseWeights, config: Config) -> None:
        held, specs = adapters.manifest.tensors, build_layers(config)
        shapes = {name: TensorEntry(shape, "float32", {}) for name, shape in base.shapes.items()}
        others = {name: entry for name, entry in held.items() if not is_adapter(name)}
        super().__init__(adapters.path, replace(adapters.manifest, tensors={**shapes, **others}))
        self.base, self.adapters, self._scale = base, adapters, config.lora.scale
        every = [each for layer in find_targets(specs, names_in_transformers(config)) for each in layer]
        self.targets: list[LoraTarget] = [target for target in every if f"{target.adapter}.a" in held]

    def verify(self, name: str, kind: str = WEIGHTS) -> None:
        if name in self.adapters.manifest.tensors:
            self.adapters.verify(name, kind)

    def tensor(
        self, name: str, kind: str = WEIGHTS, *, shard: Shard | None = None, is_verified: bool = False
    ) -> Tensor:
        targets = [target for target in self.targets if f"{target.module}.weight" == name]
        whole = self.unmerged(name)
        if targets:
            whole = whole.to(torch.float32, copy=True)
        for target in targets:
            a, b = (self.adapters.tensor(f"{target.adapter}.{part}") for part in "ab")  # (R, I), (O, R)
            whole[target.first_row : target.end_row] += self._scale * (b @ a)
        return whole if shard is None else shard.take(whole)

    def unmerged(self, name: str) -> Tensor:
        """A tensor of the model with its adapters beside the weights of the base."""
        return (self.adapters if name in self.adapters.manifest.tensors else self.base).tensor(name)

    def rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        whole = self.tensor(name)
        return whole.to(dtype).float() if whole.is_floating_point() else whole

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.manifest.tensors:
            yield name, self.tensor(name)
