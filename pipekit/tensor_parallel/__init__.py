"""Layers that a tensor group shares out, the collectives between them, and the loss over a vocabulary in parts."""

from __future__ import annotations

from pipekit.tensor_parallel.collectives import (
    copy_to_parts,
    gather_sequence,
    gather_sequence_for_parts,
    split_sequence,
    sum_parts,
    sum_parts_to_sequence,
)
from pipekit.tensor_parallel.cross_entropy import vocabulary_parallel_cross_entropy
from pipekit.tensor_parallel.cut import shard_layer
from pipekit.tensor_parallel.flow import IN_PARTS, WHOLE, SequenceFlow
from pipekit.tensor_parallel.group import PlannedGroup, TensorGroup
from pipekit.tensor_parallel.head_loss import chunked_head_loss, plan_chunk_tokens
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
from pipekit.tensor_parallel.randomness import sharded_dropout, sharded_randomness
from pipekit.tensor_parallel.shards import Shard, cut_parameter, has_partial_gradient, shard_of

__all__ = [
    "IN_PARTS",
    "WHOLE",
    "ColumnParallelLinear",
    "KeyValueLinear",
    "Logits",
    "PlannedGroup",
    "RowParallelLinear",
    "SequenceFlow",
    "Shard",
    "TensorGroup",
    "TensorParallelModule",
    "VocabularyParallelEmbedding",
    "VocabularyParallelModule",
    "chunked_head_loss",
    "column_parallel_linear",
    "column_parallel_linears",
    "copy_to_parts",
    "cut_parameter",
    "gather_sequence",
    "gather_sequence_for_parts",
    "has_partial_gradient",
    "plan_chunk_tokens",
    "shard_layer",
    "shard_of",
    "sharded_dropout",
    "sharded_randomness",
    "split_sequence",
    "sum_parts",
    "sum_parts_to_sequence",
    "vocabulary_parallel_cross_entropy",
    "whole_outputs",
]
