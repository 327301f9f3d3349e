"""Layers sharded over a tensor group, with collectives between them and a loss over a sharded vocabulary."""

from __future__ import annotations

from pipekit.tensor_parallel.collectives import (
    copy_to_shards,
    gather_sequence,
    gather_sequence_for_shards,
    reduce_scatter_sequence,
    split_sequence,
    sum_partials,
)
from pipekit.tensor_parallel.cross_entropy import cap_softly, vocabulary_parallel_cross_entropy
from pipekit.tensor_parallel.flow import SHARDED, WHOLE, SequenceFlow
from pipekit.tensor_parallel.group import PlannedGroup, TensorGroup
from pipekit.tensor_parallel.head_loss import chunk_limit_bytes, chunked_head_loss, plan_chunk_tokens
from pipekit.tensor_parallel.layers import (
    ColumnParallelLinear,
    KeyValueLinear,
    RowParallelLinear,
    TensorParallelModule,
    VocabularyParallelEmbedding,
    VocabularyParallelModule,
    column_parallel_linear,
    column_parallel_linears,
)
from pipekit.tensor_parallel.logits import Logits, whole_outputs
from pipekit.tensor_parallel.lora import LowRank, add_adapters, attach_adapters
from pipekit.tensor_parallel.randomness import sharded_dropout, sharded_randomness
from pipekit.tensor_parallel.shard_layer import shard_layer
from pipekit.tensor_parallel.shards import Shard, has_partial_gradient, mark_partial_gradient, shard_of, shard_parameter

__all__ = [
    "SHARDED",
    "WHOLE",
    "ColumnParallelLinear",
    "KeyValueLinear",
    "Logits",
    "LowRank",
    "PlannedGroup",
    "RowParallelLinear",
    "SequenceFlow",
    "Shard",
    "TensorGroup",
    "TensorParallelModule",
    "VocabularyParallelEmbedding",
    "VocabularyParallelModule",
    "add_adapters",
    "attach_adapters",
    "cap_softly",
    "chunk_limit_bytes",
    "chunked_head_loss",
    "column_parallel_linear",
    "column_parallel_linears",
    "copy_to_shards",
    "gather_sequence",
    "gather_sequence_for_shards",
    "has_partial_gradient",
    "mark_partial_gradient",
    "plan_chunk_tokens",
    "reduce_scatter_sequence",
    "shard_layer",
    "shard_of",
    "shard_parameter",
    "sharded_dropout",
    "sharded_randomness",
    "split_sequence",
    "sum_partials",
    "vocabulary_parallel_cross_entropy",
    "whole_outputs",
]
