"""Layers of transformer families, and their loss.

Each layer takes one tensor and returns one. The attention half and the MLP half of a block are separate layers, so
a partition can split a block in two.
"""

from pipekit.models.transformer.block import AttentionHalf, MLPHalf, ParallelBlock
from pipekit.models.transformer.embedding import PositionEmbedding, TokenEmbedding
from pipekit.models.transformer.head import Head, embedding_and_head, language_model_loss
from pipekit.models.transformer.norm import FINAL_NORMS, FinalNorm
from pipekit.models.transformer.rotary import Rotary

__all__ = [
    "FINAL_NORMS",
    "AttentionHalf",
    "FinalNorm",
    "Head",
    "MLPHalf",
    "ParallelBlock",
    "PositionEmbedding",
    "Rotary",
    "TokenEmbedding",
    "embedding_and_head",
    "language_model_loss",
]
