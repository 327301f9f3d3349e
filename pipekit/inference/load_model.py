"""Trained models in one process, from a checkpoint or an exported folder."""

from __future__ import annotations

from pathlib import Path

from pipekit.checkpoint.manifest import CONFIG_FILE
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import Config, load_config
from pipekit.errors import CheckpointError
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.layers.sequential import SequentialModel
from pipekit.models import build_layers
from pipekit.models.custom import CustomModelConfig
from pipekit.models.family import TransformerFamily


def load_model(checkpoint: Path, *, trust_code: bool = False) -> tuple[SequentialModel, Config]:
    """Model of a checkpoint, in evaluation mode, and its configuration.

    Args:
        checkpoint: folder of the checkpoint.
        trust_code: whether the function that its configuration names as `model.builder` may be imported and called.

    Raises:
        CheckpointError: if either cannot be read, or the model is built by code that is not trusted.
    """
    reader = CheckpointReader(checkpoint)
    config = read_config(reader)
    return read_model(reader, config, trust_code=trust_code), config


def read_config(reader: CheckpointReader) -> Config:
    """Configuration of an open checkpoint; a CheckpointError if it has none. Runs no code that it names."""
    file = reader.file(CONFIG_FILE)
    if file is None:
        raise CheckpointError(f"{reader.path}: its manifest lists no {CONFIG_FILE}, so its model is unknown")
    if reader.manifest.training.client_state:
        raise CheckpointError(
            f"{reader.path}: was written by a training loop of its own, and tells its layers and no model section; "
            "pipekit export --raw writes its tensors, with a loader beside them"
        )
    return load_config(file)


def read_model(reader: CheckpointReader, config: Config, *, trust_code: bool = False) -> SequentialModel:
    """Model of an open checkpoint, in evaluation mode.

    Raises:
        CheckpointError: if it does not fit the configuration, or is built by code that is not trusted.
    """
    if isinstance(config.model, CustomModelConfig) and not trust_code:
        raise CheckpointError(
            f"{reader.path}: model.builder={config.model.builder} is code, which a checkpoint of unknown origin must "
            "not run; add --trust-code if you know where it comes from"
        )
    # A layer of the user's own may compute more in its constructor than a checkpoint holds.
    seed = None if isinstance(config.model, TransformerFamily) else config.train.seed
    model = SequentialModel(build_layers(config), seed=seed)
    model.load_logical_tensors(dict(reader.weights()), where=str(reader.path))
    return model.eval()


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
