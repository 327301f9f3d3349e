"""Trained models in one process, from a checkpoint or an exported folder."""

from __future__ import annotations

from pathlib import Path

from pipekit.checkpoint.manifest import CONFIG_FILE, TOKENIZER_FILE
from pipekit.checkpoint.model_config import read_model_config
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import Config, ModelConfigSource, load_stored_config
from pipekit.data.tokenizer import find_tokenizer_file
from pipekit.errors import CheckpointError
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.layers.sequential import SequentialModel
from pipekit.models import build_layers
from pipekit.models.custom import CustomModelConfig
from pipekit.models.family import TransformerFamily


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
    reader = CheckpointReader(checkpoint)
    config = read_config(reader, given)
    check_trusted(reader, config, trust_code=trust_code or given is not None)
    model = SequentialModel(build_layers(config), seed=initial_seed(config))
    model.load_logical_tensors(dict(reader.weights()), where=str(reader.path))
    return model.eval(), config, find_tokenizer(reader, config if given is not None else None)


def read_config(reader: CheckpointReader, given: ModelConfigSource | None = None) -> Config:
    """Configuration of an open checkpoint's model: the one given, or that which it holds.

    Code that a checkpoint names is not run; `model.builder` of a configuration that is given is.

    Raises:
        CheckpointError: if it holds none.
        ConfigError: if what is given describes another model.
    """
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


def load_exported_model(folder: Path) -> tuple[SequentialModel, TransformerFamily]:
    """Model of an exported folder, in evaluation mode, and its settings.

    Raises:
        CheckpointError: if a file cannot be read, or the tensors are another model's.
        ConfigError: if the model is of no family here.
    """
    source = HuggingFaceFolder(folder)
    model = SequentialModel(source.model.layer_specs(), seed=None)
    model.load_logical_tensors({name: source.tensor(name) for name in source.shapes}, where=str(folder))
    return model.eval(), source.model
