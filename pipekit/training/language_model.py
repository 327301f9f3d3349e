"""The shipped trial: a language model on text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset

from pipekit.config import Config
from pipekit.costs.example import Example, language_model_example
from pipekit.data.collate import MapDataset
from pipekit.data.dataset import TokenDataset
from pipekit.data.megatron import TokenSlice
from pipekit.data.mixture import MixedSource, Mixture, whole_weights
from pipekit.data.prepare import prepare_data
from pipekit.data.prepared import PreparedData
from pipekit.errors import ConfigError, DataError
from pipekit.files import late_limit_s
from pipekit.layers.specs import LayerSpec
from pipekit.models import build_layers
from pipekit.models.transformer import language_model_loss
from pipekit.progress import ProgressCallback
from pipekit.training.layers_trial import LayersTrial

_logger = logging.getLogger(__name__)

_LARGE_VOCABULARY, _PADDING = 1.25, 1024
"""A vocabulary beyond both is larger than anybody pads one."""


class LanguageModelTrial(LayersTrial):
    """Trains the configuration's model to predict the next token of the configuration's text."""

    @classmethod
    def prepare(cls, config: Config, on_progress: ProgressCallback | None = None) -> dict[str, Any]:
        """Train or load the tokenizer, and turn the text into tokens."""
        return _prepare(config, on_progress).model_dump(mode="json")

    @classmethod
    def resolve(cls, config: Config, prepared: Mapping[str, Any]) -> Config:
        """Return the configuration with the size of the vocabulary."""
        data = PreparedData.model_validate(prepared)
        changes = config.model.fit_vocabulary(data.vocab_size, tokenizer=data.tokenizer_path)
        given = getattr(config.model, "vocab_size", None)
        if isinstance(given, int) and given > max(_LARGE_VOCABULARY * data.vocab_size, data.vocab_size + _PADDING):
            _logger.warning(
                "model.vocab_size=%s has rows for %s tokens more than the tokenizer's %s, which are never trained and "
                "take memory and time; model.vocab_size=auto has no others",
                f"{given:,}",
                f"{given - data.vocab_size:,}",
                f"{data.vocab_size:,}",
            )
        return config.updated(changes) if changes else config

    @classmethod
    def build_layers(cls, config: Config) -> list[LayerSpec]:
        return build_layers(config)

    @classmethod
    def example(cls, config: Config, micro_batch_size: int) -> Example:
        return language_model_example(micro_batch_size, config.train.sequence_length)

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        if outputs.shape[-1] < self.data.vocab_size:
            raise ConfigError(
                f"the model's last layer scores {outputs.shape[-1]} tokens and the tokenizer has "
                f"{self.data.vocab_size}; widen it, or lower data.vocab_size"
            )
        return language_model_loss(outputs, labels)

    def build_train_dataset(self) -> MapDataset:
        datasets = [self._dataset(source.train) for source in self.data.sources]
        if len(datasets) == 1:
            return datasets[0]
        return ConcatDataset(datasets)

    def build_mixture(self, dataset: MapDataset) -> Mixture | None:
        config = self.context.config
        if config.data.mixture is None:
            return None
        ends = dataset.cumulative_sizes if isinstance(dataset, ConcatDataset) else [len(dataset)]
        sizes = [end - begin for begin, end in pairwise([0, *ends])]
        sources = tuple(
            MixedSource(entry.name, size, entry.epochs, prepared.fingerprint)
            for entry, prepared, size in zip(config.data.entries, self.data.sources, sizes, strict=True)
        )
        stages = [(0, {entry.name: entry.weight for entry in config.data.entries})]
        stages += [(stage.after_step, dict(stage.weights)) for stage in config.data.stages]
        names = [source.name for source in sources]
        whole = tuple(
            (step, whole_weights([weights.get(name, 0) for name in names], sizes)) for step, weights in stages
        )
        return Mixture(sources, whole, config.train.seed, config.data.shuffle)

    def build_validation_dataset(self) -> MapDataset | Mapping[str, MapDataset] | None:
        held_out = {
            source.name: self._dataset(source.validation)
            for source in self.data.sources
            if source.validation is not None
        }
        return held_out if self.context.config.data.mixture else next(iter(held_out.values()), None)

    def _dataset(self, tokens: TokenSlice) -> TokenDataset:
        return TokenDataset(tokens, self.context.config.train.sequence_length)

    @cached_property
    def data(self) -> PreparedData:
        """The prepared text. A machine that does not see the files of the one that planned prepares it anew."""
        planned = PreparedData.model_validate(self.context.plan.prepared)
        if planned.is_here(limit_s=late_limit_s(self.context.config.run.timeout_s)):
            return planned
        found = _prepare(self.context.config)
        if found.fingerprint != planned.fingerprint:
            here, there = (data.sources[0].train.path for data in (found, planned))
            raise DataError(
                f"data.source: the text of this machine gives other tokens ({here}) than that of rank 0's ({there}); "
                "copy it there, or set data.cache_dir to a folder that all machines share"
            )
        return found

    @property
    def data_fingerprint(self) -> str:
        # Each source of a mixture has one of its own, so that others can come and go.
        return self.data.sources[0].fingerprint if self.context.config.data.mixture is None else ""

    @property
    def tokenizer_file(self) -> Path:
        return self.data.tokenizer_path


def _prepare(config: Config, on_progress: ProgressCallback | None = None) -> PreparedData:
    return prepare_data(
        config.data,
        sequence_length=config.train.sequence_length,
        timeout_s=config.run.timeout_s,
        on_progress=on_progress,
    )
