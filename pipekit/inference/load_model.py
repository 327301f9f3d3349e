"""Trained models, whole or a rank's part, from a checkpoint or an exported folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import CONFIG_FILE, TOKENIZER_FILE, resolve_checkpoint
from pipekit.checkpoint.model_config import read_model_config
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import Config, ModelConfigSource, load_stored_config
from pipekit.data.tokenizer import find_tokenizer_file
from pipekit.errors import CheckpointError, ConfigError
from pipekit.inference.base_weights import with_base
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.layers.parameters import count_layer_parameters
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec, layer_names
from pipekit.models import build_layers
from pipekit.models.custom import CustomModelConfig
from pipekit.models.family import TransformerFamily
from pipekit.models.imported import HF_CONFIG_FILE
from pipekit.partitioners import PartitionInputs, partition
from pipekit.tensor_parallel.group import PlannedGroup, TensorGroup
from pipekit.tensor_parallel.shards import Shard, shard_of


@dataclass(frozen=True)
class StoredModel:
    """A trained model in its files: what is needed to build it, or one rank's part of it.

    Adapters are merged into the weights that they are added to.

    Attributes:
        path: folder of the checkpoint or the export.
        specs: its layers.
        longest_sequence: most tokens that a sequence may have.
        tokenizer_file: None where it holds no tokenizer.
        seed: of the initial weights; None where the files hold all that layers compute with.
        shapes: of all its tensors, by logical name.
        read: returns a tensor by its logical name, or a shard of it.
    """

    path: Path
    specs: list[LayerSpec]
    longest_sequence: int
    tokenizer_file: Path | None
    seed: int | None
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str, Shard | None], Tensor]

    def build(self, *, layers: range | None = None, group: TensorGroup | None = None) -> SequentialModel:
        """The model in evaluation mode, or the layers of one stage, or one tensor-parallel rank's shards of them.

        No more is read than that.

        Raises:
            CheckpointError: if a file is damaged, or the tensors are another model's.
        """
        where = str(self.path)
        model = SequentialModel(self.specs, seed=self.seed, layers=layers, group=group)
        if layers is None and group is None:
            names: Iterable[str] = self.shapes
        else:
            whole = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
            SequentialModel(self.specs, seed=None).check_logical_tensors(whole, where=where)
            names = model.logical_tensors()
        shards = {name: shard_of(own) for name, own in model.logical_tensors().items()}
        model.load_logical_tensors({name: self.read(name, shards.get(name)) for name in names}, where=where)
        return model.eval()

    def cut(self, *, pp: int, tp: int = 1) -> list[range]:
        """Layers of each stage of a pipeline, which are cut by their parameters. Nothing is allocated.

        Raises:
            PipekitError: if there are fewer layers than stages, or tensor-parallel ranks cannot share a layer out.
        """
        if tp > 1:
            SequentialModel(self.specs, seed=None, group=PlannedGroup(0, tp))
        facts = PartitionInputs(
            [spec.type_name for spec in self.specs],
            lambda: count_layer_parameters(self.specs),
            layer_names=layer_names(self.specs),
            placement=range(pp),
        )
        return [range(first, end) for first, end in pairwise(partition("parameters", facts, pp))]


def open_model(source: Path, *, given: ModelConfigSource | None = None, trust_code: bool = False) -> StoredModel:
    """Open the model of a run, a checkpoint or an export; its weights are read when it is built.

    Args:
        source: the run's folder, one of its checkpoints, or an exported folder.
        given: configuration of the model, in place of the checkpoint's own; see `load_model_config`.
        trust_code: whether the function that the checkpoint names as `model.builder` may be imported and called.

    Raises:
        PipekitError: if there is no model, a file cannot be read, or code is not trusted.
    """
    if (source / HF_CONFIG_FILE).is_file():
        if given is not None:
            raise ConfigError(f"--config: {source} is an export, which describes its model itself; leave --config out")
        folder = HuggingFaceFolder(source)
        tokenizer_file = source / TOKENIZER_FILE
        return StoredModel(
            source,
            folder.model.layer_specs(),
            folder.model.longest_sequence,
            tokenizer_file if tokenizer_file.is_file() else None,
            None,
            folder.shapes,
            lambda name, shard: folder.tensor(name, shard=shard),
        )
    return _open_checkpoint(resolve_checkpoint(source), given, trust_code=trust_code)[0]


def _open_checkpoint(path: Path, given: ModelConfigSource | None, *, trust_code: bool) -> tuple[StoredModel, Config]:
    reader = CheckpointReader(path)
    config = read_config(reader, given)
    check_trusted(reader, config, trust_code=trust_code or given is not None)
    reader = with_base(reader, config)
    stored = StoredModel(
        reader.path,
        build_layers(config),
        config.model.longest_sequence or config.train.sequence_length,
        find_tokenizer(reader, config if given is not None else None),
        initial_seed(config),
        reader.shapes,
        lambda name, shard: reader.tensor(name, shard=shard),
    )
    return stored, config


def load_model(
    checkpoint: Path, *, given: ModelConfigSource | None = None, trust_code: bool = False
) -> tuple[SequentialModel, Config, Path | None]:
    """Model of a checkpoint, in evaluation mode, its configuration, and the file of its tokenizer if there is one.

    Args:
        checkpoint: folder of the checkpoint.
        given: configuration of the model, in place of the checkpoint's own; see `load_model_config`.
        trust_code: whether the function that the checkpoint names as `model.builder` may be imported and called.

    Raises:
        PipekitError: if something cannot be read or does not fit, or the model is built by code that is not trusted.
    """
    stored, config = _open_checkpoint(checkpoint, given, trust_code=trust_code)
    return stored.build(), config, stored.tokenizer_file


def read_config(reader: CheckpointReader, given: ModelConfigSource | None = None) -> Config:
    """Configuration of an open checkpoint's model: the one given, or that which it holds.

    Code that a checkpoint names is not run; `model.builder` of a configuration that is given is.

    Raises:
        CheckpointError: if it holds none.
        ConfigError: if what is given describes another model, or the checkpoint holds adapters.
    """
    if given is not None and reader.manifest.training.base:
        raise ConfigError(
            f"--config: {reader.path} holds adapters, and its {CONFIG_FILE} tells their model; leave it out"
        )
    if given is not None:
        shapes = {name: entry.shape for name, entry in reader.manifest.tensors.items()}
        return read_model_config(given, shapes, of=reader.path)
    file = reader.file(CONFIG_FILE)
    config = None if file is None else load_stored_config(file)
    if config is None:
        raise CheckpointError(
            f"{reader.path}: does not tell its model, as it was written by a script without model_config= or by "
            "pipekit migrate without --config; describe the model in a YAML file, for example with model: {preset: "
            "gpt2}, and add --config FILE.yaml; pipekit export --raw writes the tensors alone"
        )
    return config


def find_tokenizer(reader: CheckpointReader, given: Config | None = None) -> Path | None:
    """File of the tokenizer of an open checkpoint: that of the configuration given, or its own."""
    if given is not None and given.data.tokenizer is not None:
        return find_tokenizer_file(given.data.tokenizer)
    return reader.file(TOKENIZER_FILE)


def check_trusted(reader: CheckpointReader, config: Config, *, trust_code: bool) -> None:
    """Raise a CheckpointError if a model is built by code that a checkpoint names, and that is not trusted."""
    if isinstance(config.model, CustomModelConfig) and not trust_code:
        raise CheckpointError(
            f"{reader.path}: model.builder={config.model.builder} is code, which a checkpoint of unknown origin must "
            "not run; add --trust-code if you know where it comes from"
        )


def initial_seed(config: Config) -> int | None:
    """Seed with which the layers of a checkpoint are built; None where it holds all that they compute with."""
    # A layer of the user's own may compute more in its constructor than a checkpoint holds.
    return None if isinstance(config.model, TransformerFamily) else config.train.seed
