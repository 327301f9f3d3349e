"""Importing a Hugging Face model as the first checkpoint of a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipekit.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    WEIGHTS,
    Manifest,
    TensorEntry,
    TrainingState,
    checkpoint_name,
    file_checksum,
    list_checkpoints,
)
from pipekit.checkpoint.writer import write_tensors
from pipekit.config import Config, parse_config
from pipekit.data.tokenizer import copy_tokenizer, find_tokenizer_file, load_tokenizer, tokenizer_files
from pipekit.errors import ConfigError
from pipekit.files import building_folder, write_atomically
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.models.family import TransformerFamily
from pipekit.run_lock import hold_run
from pipekit.storage import storing

_STEPS, _LONGEST_SEQUENCE = 1000, 1024


def import_config(source: str | Path, run: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Configuration of a run that goes on from a Hugging Face model. Its files are checked, and nothing is written.

    Args:
        source: folder of the model.
        run: folder of the run.
        overrides: changes such as `"train.steps=20"`, which go before what follows from the model.

    Raises:
        PipekitError: if the model cannot be imported; the message names the setting or the tensor.
    """
    values: dict[str, Any] = {"model": {"family": "auto", "init_from": str(source)}, "train": {"steps": _STEPS}}
    if run is not None:
        values["run"] = {"dir": str(run)}
    overrides = list(overrides)
    known = parse_config(
        {**values, "train": {"steps": 1, "sequence_length": 1}}, [o for o in overrides if "model." in o]
    )
    longest = min(known.model.longest_sequence or _LONGEST_SEQUENCE, _LONGEST_SEQUENCE)
    values["train"]["sequence_length"] = longest
    config = parse_config(values, overrides)
    assert isinstance(config.model, TransformerFamily)
    HuggingFaceFolder(Path(source).expanduser(), config.model).check()
    if (path := config.data.tokenizer) is not None:
        config.model.fit_vocabulary(load_tokenizer(path).vocab_size, tokenizer=path)
    return config


def import_model(source: str | Path, run: str | Path, overrides: Iterable[str] = ()) -> tuple[Path, Config]:
    """Write a Hugging Face model as the checkpoint of step 0 of a new run, and return it with its configuration.

    The tensors keep their number format, and one at a time is in memory. The tokenizer's files are copied to
    `tokenizer/` in the run's folder.

    Raises:
        PipekitError: if the model cannot be imported, or the folder holds a run already; nothing is written then.
    """
    config = import_config(source, run, overrides)
    folder, run = Path(source).expanduser(), Path(run)
    with hold_run(run), storing(run):
        if (run / CONFIG_FILE).exists() or list_checkpoints(run / CHECKPOINTS_FOLDER):
            raise ConfigError(f"{run}: holds a run already; give another folder")
        model = config.model
        assert isinstance(model, TransformerFamily)
        final = run / CHECKPOINTS_FOLDER / checkpoint_name(0)
        changes: dict[str, str | None] = {"model.init_from": None}
        if config.data.tokenizer == str(folder):
            (run / "tokenizer").mkdir(exist_ok=True)
            copy_tokenizer(folder, run / "tokenizer")
            changes["data.tokenizer"] = str(run / "tokenizer")
        config = config.updated(changes)
        with building_folder(final) as temporary:
            _write_checkpoint(temporary, HuggingFaceFolder(folder, model), config)
        write_atomically(final.parent / LATEST_FILE, final.name + "\n")
        write_atomically(run / CONFIG_FILE, config.to_yaml())
    return final, config


def _write_checkpoint(checkpoint: Path, source: HuggingFaceFolder, config: Config) -> None:
    file = f"{WEIGHTS}-0000.safetensors"
    dtypes = source.dtypes
    planned = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in source.shapes.items()}
    checksums = write_tensors(checkpoint / file, planned, read=source.tensor)
    tensors = {
        name: TensorEntry(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            {WEIGHTS: file},
            checksums={WEIGHTS: checksums[name]},
        )
        for name, tensor in planned.items()
    }
    write_atomically(checkpoint / CONFIG_FILE, config.to_yaml())
    if config.data.tokenizer is not None:
        for name, path in tokenizer_files(find_tokenizer_file(config.data.tokenizer)).items():
            shutil.copyfile(path, checkpoint / name)
    files = list(checkpoint.iterdir())
    manifest = Manifest(
        TrainingState(
            step=0, consumed_samples=0, seed=config.train.seed, lr=0.0, optimizer={"type": config.optimizer.type}
        ),
        tensors,
        {path.name: path.stat().st_size for path in files},
        {name: version(name) for name in ("pipekit", "torch")},
        {path.name: file_checksum(path) for path in files if path.name != file},
    )
    write_atomically(checkpoint / MANIFEST_FILE, manifest.to_json())
