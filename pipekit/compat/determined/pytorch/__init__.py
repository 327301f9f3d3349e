"""Names of `determined.pytorch` that trials on DeepSpeed use."""

from __future__ import annotations

from typing import Any

from pipekit.compat.determined.pytorch import deepspeed as deepspeed
from pipekit.compat.determined.pytorch import samplers as samplers
from pipekit.data.data_loader import DataLoader as DataLoader
from pipekit.data.data_loader import data_length as data_length
from pipekit.data.samplers import adapt_batch_sampler as adapt_batch_sampler
from pipekit.training.periods import Batch as Batch
from pipekit.training.periods import Epoch as Epoch
from pipekit.training.reducers import MetricReducer as MetricReducer
from pipekit.training.reducers import Reducer as Reducer
from pipekit.training.trial_callbacks import TrialCallback as PyTorchCallback

__all__ = [
    "Batch",
    "DataLoader",
    "Epoch",
    "MetricReducer",
    "PyTorchCallback",
    "Reducer",
    "TorchData",
    "adapt_batch_sampler",
    "data_length",
    "deepspeed",
    "samplers",
]

TorchData = Any
"""Batches: tensors, and tuples, lists and dicts of them."""
