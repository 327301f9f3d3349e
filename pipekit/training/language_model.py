"""The default trial: a language model trained on text."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset

from pipekit.config import Config
from pipekit.config.growth import samples_of_steps, steps_of_samples
from pipekit.costs.example import Example, language_model_example
from pipekit.data.collate import MapDataset
from pipekit.data.mixture import MixedSource, Mixture, whole_weights
from pipekit.data.prepare import prepare_data
from pipekit.data.prepared import PreparedData, PreparedSource
from pipekit.data.samples import PackedDataset, TokenDataset, build_samples, choose_packing
from pipekit.data.samples.loss_mask import IGNORED_LABEL
from pipekit.errors import ConfigError, DataError
from pipekit.files import late_limit_s
from pipekit.layers.specs import LayerSpec
from pipekit.models import build_layers
from pipekit.models.transformer import language_model_loss
from pipekit.models.transformer.documents import check_takes_documents
from pipekit.progress import ProgressCallback
from pipekit.training.layers_trial import LayersTrial

_logger = logging.getLogger(__name__)

_LARGE_VOCABULARY, _PADDING = 1.25, 1024
"""A vocabulary beyond both is larger than anybody pads one."""


class LanguageModelTrial(LayersTrial):
    """Trial of a language model: the configuration's model learns to predict the next token of its text."""

    @classmethod
    def prepare(cls, config: Config, on_progress: ProgressCallback | None = None) -> dict[str, Any]:
        """Train or load the tokenizer, and tokenize the text."""
        data = _prepare(config, on_progress)
        counts = {
            source.name: str(_build_samples(config, source, held_out=False).counts)
            for source in data.sources
            if choose_packing(config.data, has_loss_mask=source.has_loss_mask) != "concat"
        }
        return {**data.model_dump(mode="json"), "samples": counts}

    @classmethod
    def resolve(cls, config: Config, prepared: Mapping[str, Any]) -> Config:
        """Return the configuration with the vocabulary size, and with the number of steps for `train.epochs`."""
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
        if not config.train.has_steps and cls.build_train_dataset is LanguageModelTrial.build_train_dataset:
            assert config.train.epochs is not None
            num_samples = len(_build_samples(config, data.sources[0], held_out=False))
            changes["train.steps"] = steps_of_samples(math.ceil(config.train.epochs * num_samples), config.train)
        return config.updated(changes) if changes else config

    @classmethod
    def build_layers(cls, config: Config) -> list[LayerSpec]:
        specs = build_layers(config)
        if _has_positions(config):
            check_takes_documents(specs)
        return specs

    @classmethod
    def example(cls, config: Config, micro_batch_size: int) -> Example:
        length = config.train.sequence_length
        return language_model_example(micro_batch_size, length, has_positions=_has_positions(config))

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        if outputs.shape[-1] < self.data.vocab_size:
            raise ConfigError(
                f"the model's last layer scores {outputs.shape[-1]} tokens and the tokenizer has "
                f"{self.data.vocab_size}; widen it, or lower data.vocab_size"
            )
        return language_model_loss(outputs, labels)

    def loss_weight(self, labels: Any) -> Tensor | None:
        if not self._leaves_labels_out:
            return None
        count: Tensor = (labels != IGNORED_LABEL).sum()
        return count

    @cached_property
    def _leaves_labels_out(self) -> bool:
        """True if samples differ in their number of labels."""
        config, sources = self.context.config.data, PreparedData.model_validate(self.context.plan.prepared).sources
        masks = [source.has_loss_mask for source in sources]
        packings = {choose_packing(config, has_loss_mask=has_loss_mask) for has_loss_mask in masks}
        return config.document_mask or any(masks) or packings != {"concat"}

    def build_train_dataset(self) -> MapDataset:
        datasets = [_build_samples(self.context.config, source, held_out=False) for source in self.data.sources]
        if len(datasets) == 1:
            return datasets[0]
        return ConcatDataset(datasets)

    def build_mixture(self, dataset: MapDataset) -> Mixture | None:
        ends = dataset.cumulative_sizes if isinstance(dataset, ConcatDataset) else [len(dataset)]
        return _plan_mixture(self.context.config, self.data, [end - begin for begin, end in pairwise([0, *ends])])

    def build_validation_dataset(self) -> MapDataset | Mapping[str, MapDataset] | None:
        held_out = {
            source.name: _build_samples(self.context.config, source, held_out=True)
            for source in self.data.sources
            if source.validation is not None
        }
        return held_out if self.context.config.data.mixture else next(iter(held_out.values()), None)

    @cached_property
    def data(self) -> PreparedData:
        """The prepared text. A machine that does not see the planning machine's files prepares the text again."""
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


def count_epochs(config: Config, data: PreparedData) -> dict[str, float]:
    """Epochs of each source that all steps of a run read, by the source's name.

    Raises:
        DataError: if a source does not hold even one sample.
    """
    sizes = [len(_build_samples(config, source, held_out=False)) for source in data.sources]
    num_samples = samples_of_steps(config.train, config.train.steps)
    mixture, counts = _plan_mixture(config, data, sizes), {data.sources[0].name: num_samples}
    if mixture is not None:
        order = mixture.order(batch_size=partial(samples_of_steps, config.train))
        counts = order.counts(int(min(num_samples, order.end)))
    return {source.name: counts[source.name] / size for source, size in zip(data.sources, sizes, strict=True)}


def _plan_mixture(config: Config, data: PreparedData, sizes: Sequence[int]) -> Mixture | None:
    """Mixture of sources of the given sizes, in samples; None if there is only `data.source`."""
    if config.data.mixture is None:
        return None
    sources = tuple(
        MixedSource(entry.name, size, entry.epochs, prepared.fingerprint)
        for entry, prepared, size in zip(config.data.entries, data.sources, sizes, strict=True)
    )
    stages = [(0, {entry.name: entry.weight for entry in config.data.entries})]
    stages += [(stage.after_step, dict(stage.weights)) for stage in config.data.stages]
    names = [source.name for source in sources]
    whole = tuple((step, whole_weights([weights.get(name, 0) for name in names], sizes)) for step, weights in stages)
    return Mixture(sources, whole, config.train.seed, config.data.shuffle)


def _has_positions(config: Config) -> bool:
    """True if samples hold each token's position in its document besides the token ids."""
    return config.data.document_mask and config.data.packing != "none"


def _build_samples(config: Config, source: PreparedSource, *, held_out: bool) -> TokenDataset | PackedDataset:
    token_slice = source.validation if held_out else source.train
    assert token_slice is not None
    return build_samples(
        token_slice, config.train.sequence_length, config=config.data, has_loss_mask=source.has_loss_mask
    )


def _prepare(config: Config, on_progress: ProgressCallback | None = None) -> PreparedData:
    return prepare_data(
        config.data,
        sequence_length=config.train.sequence_length,
        timeout_s=config.run.timeout_s,
        on_progress=on_progress,
    )
