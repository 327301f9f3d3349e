"""Texts to measure perplexity on: the text that a run has held out, or any other by the keys of the `data` section."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipekit.checkpoint.manifest import CHECKPOINTS_FOLDER, TOKENIZER_FILE, resolve_checkpoint
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import Config, DataConfig, ModelConfigSource, parse_config
from pipekit.config.schema import RunConfig
from pipekit.data.megatron import TokenSlice
from pipekit.data.prepare import prepare_data
from pipekit.data.prepared import PreparedData
from pipekit.data.samples.loss_mask import load_loss_mask
from pipekit.errors import CheckpointError, ConfigError
from pipekit.inference.load_model import find_tokenizer, read_config
from pipekit.models.imported import HF_CONFIG_FILE
from pipekit.plan.run_folder import RunFolder, read_plan
from pipekit.progress import ProgressCallback

# What a model without a run sees at once, unless it is asked for more.
_LONGEST_WINDOW = 2048
_SOURCES = {"data.source", "data.mixture"}


@dataclass(frozen=True)
class EvaluatedSource:
    """Where a model comes from.

    Attributes:
        path: folder of the checkpoint or the export.
        tokenizer_file: the model's `tokenizer.json`.
        config: configuration of its run; None of an export.
        step: steps that it was trained for; None of an export.
        run: the run's folder; None where the checkpoint lies in none, or it is an export.
    """

    path: Path
    tokenizer_file: Path
    config: Config | None = None
    step: int | None = None
    run: RunFolder | None = None

    @classmethod
    def read(cls, source: Path, given: ModelConfigSource | None = None) -> EvaluatedSource:
        """Read what there is beside the weights in a run, a checkpoint or an export.

        Args:
            source: the run's folder, one of its checkpoints, or an exported folder.
            given: configuration of the model, in place of the checkpoint's own.

        Raises:
            PipekitError: if there is no model, or no tokenizer.
        """
        if (source / HF_CONFIG_FILE).is_file():
            return cls(source, _found(source, source / TOKENIZER_FILE))
        reader = CheckpointReader(resolve_checkpoint(source))
        config = read_config(reader, given)
        tokenizer_file = _found(reader.path, find_tokenizer(reader, config if given is not None else None))
        folder = reader.path.absolute().parent
        run = RunFolder(folder.parent) if folder.name == CHECKPOINTS_FOLDER else None
        has_run = run is not None and run.config.is_file()
        return cls(reader.path, tokenizer_file, config, reader.manifest.training.step, run if has_run else None)

    def window(self, longest_sequence: int) -> int:
        """Tokens that the model sees at once unless that is asked for: as in training, where it is known."""
        trained = _LONGEST_WINDOW if self.config is None else self.config.train.sequence_length
        return min(trained, longest_sequence)


@dataclass(frozen=True)
class Text:
    """Tokens of a text, each document with the token that ends it.

    Attributes:
        name: of the text.
        tokens: of all documents, one after the other `(N,)`.
        conversations: where each conversation begins, and the last one ends; None of text, which is read on from one
            document to the next.
        loss_mask: whether each token counts in the loss `(N,)`; None where all do.
    """

    name: str
    tokens: npt.NDArray[Any]
    conversations: npt.NDArray[np.int64] | None = None
    loss_mask: npt.NDArray[np.uint8] | None = None

    @classmethod
    def load(cls, name: str, tokens: TokenSlice, *, has_loss_mask: bool) -> Text:
        """Text of a slice of a token file, memory-mapped, with the loss mask beside it where there is one.

        Raises:
            DataError: if a file is missing or broken.
        """
        if not has_loss_mask:
            return cls(name, tokens.load_tokens())
        return cls(name, tokens.load_tokens(), tokens.load_bounds(), load_loss_mask(tokens))


def find_texts(
    source: EvaluatedSource,
    changes: Sequence[str],
    *,
    on_progress: ProgressCallback | None = None,
) -> list[Text]:
    """Find or prepare the texts to evaluate on.

    Without changes it is the text that the run has held out. All of another `data.source` is taken, unless
    `data.validation_fraction` is given.

    Args:
        source: of the model.
        changes: of the run's `data` section, such as `data.source=other.txt`.
        on_progress: called as texts are prepared.

    Raises:
        ConfigError: if a change is of another section, or no text is known.
        DataError: if a text cannot be read.
    """
    for change in changes:
        if not change.startswith("data."):
            raise ConfigError(f"{change}: only the data can be another, by keys such as data.source=other.txt")
        if change.startswith("data.tokenizer="):
            raise ConfigError(f"{change}: the model has its own tokenizer ({source.tokenizer_file}); leave this out")
    named = {change.partition("=")[0] for change in changes}
    if not named & _SOURCES:
        if source.config is None:
            raise ConfigError(
                f"{source.path}: is an export, and holds no text to evaluate on; add data.source=FILE, or --tasks"
            )
        if source.config.run.trial is not None:
            raise ConfigError(
                f"{source.path}: was trained on data of its own by run.trial={source.config.run.trial}; add "
                "data.source=FILE"
            )
    data = _data_config(source, changes, named)
    prepared = None if changes else _planned(source)
    if prepared is None:
        run = RunConfig() if source.config is None else source.config.run
        prepared = prepare_data(data, sequence_length=1, timeout_s=run.timeout_s, on_progress=on_progress)
    sources = dict(zip((entry.name for entry in data.entries), data.entries, strict=True))
    texts = []
    for each in prepared.sources:
        shown = ", ".join(sources[each.name].sources) if len(prepared.sources) == 1 else each.name
        name, tokens = (shown, each.train) if each.validation is None else (f"held out of {shown}", each.validation)
        texts.append(Text.load(name, tokens, has_loss_mask=each.has_loss_mask))
    return texts


def _data_config(source: EvaluatedSource, changes: Sequence[str], named: set[str]) -> DataConfig:
    own = DataConfig() if source.config is None else source.config.data
    values = {**own.model_dump(), "tokenizer": str(source.tokenizer_file)}
    if named & _SOURCES:
        # Nothing of the run's own sources is left.
        values |= {key: DataConfig.model_fields[key].default for key in ("source", "mixture", "stages", "validation")}
        values["validation_fraction"] = 0.0
    # The other sections must be there, and are not looked at.
    return parse_config({"model": {"preset": "tiny"}, "train": {"steps": 1}, "data": values}, changes).data


def _planned(source: EvaluatedSource) -> PreparedData | None:
    """Text that the run has prepared, if it is still there, with the tokens of the model's tokenizer."""
    if source.run is None or not source.run.plan.is_file():
        return None
    with suppress(ConfigError, ValueError, OSError):
        prepared = PreparedData.model_validate(read_plan(source.run.plan).prepared)
        is_own = prepared.is_here(limit_s=0) and (
            prepared.tokenizer_path.read_bytes() == source.tokenizer_file.read_bytes()
        )
        return prepared if is_own else None
    return None


def _found(path: Path, tokenizer_file: Path | None) -> Path:
    if tokenizer_file is None or not tokenizer_file.is_file():
        raise CheckpointError(f"{path}: holds no {TOKENIZER_FILE}, so that no text can be evaluated")
    return tokenizer_file
