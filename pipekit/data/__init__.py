"""Data: corpora, tokenizers, tokenized text, sample order, samplers and data loaders.

Nothing here starts a rank or communicates with one: ranks are plain numbers. The names below are imported when they are
first used, because they need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipekit.data.data_loader import DataLoader as DataLoader
    from pipekit.data.data_loader import data_length as data_length
    from pipekit.data.samplers import DistributedBatchSampler as DistributedBatchSampler
    from pipekit.data.samplers import DistributedSampler as DistributedSampler
    from pipekit.data.samplers import RepeatBatchSampler as RepeatBatchSampler
    from pipekit.data.samplers import RepeatSampler as RepeatSampler
    from pipekit.data.samplers import ReproducibleShuffleBatchSampler as ReproducibleShuffleBatchSampler
    from pipekit.data.samplers import ReproducibleShuffleSampler as ReproducibleShuffleSampler
    from pipekit.data.samplers import SkipBatchSampler as SkipBatchSampler
    from pipekit.data.samplers import SkipSampler as SkipSampler
    from pipekit.data.samplers import adapt_batch_sampler as adapt_batch_sampler

__all__ = [
    "DataLoader",
    "DistributedBatchSampler",
    "DistributedSampler",
    "RepeatBatchSampler",
    "RepeatSampler",
    "ReproducibleShuffleBatchSampler",
    "ReproducibleShuffleSampler",
    "SkipBatchSampler",
    "SkipSampler",
    "adapt_batch_sampler",
    "data_length",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipekit.data' has no attribute {name!r}")
    home = "data_loader" if name in ("DataLoader", "data_length") else "samplers"
    return getattr(import_module(f"pipekit.data.{home}"), name)
