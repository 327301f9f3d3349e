"""Interleaved 1F1B: several stages per rank, which divides the bubble by their number."""

from __future__ import annotations

from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule


def plan_interleaved_1f1b(*, pp: int, stages_per_rank: int, num_micro_batches: int) -> Schedule:
    """Return the interleaved 1F1B table; stage `s` is on rank `s % pp`.

    Micro-batches run in groups of `pp`: a rank runs a group on its first stage, then on its second, and so on. The
    number of micro-batches must be a multiple of `pp`.

    Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 2.2.

    Example:
        >>> print(plan_interleaved_1f1b(pp=2, stages_per_rank=2, num_micro_batches=2))
        0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
        1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
    """
    assert num_micro_batches % pp == 0, "interleaved 1F1B takes whole groups of pp micro-batches"
    total = num_micro_batches * stages_per_rank

    def forward(rank: int, position: int) -> Action:
        group, within = divmod(position, pp * stages_per_rank)
        return Action(within // pp * pp + rank, "F", group * pp + within % pp)

    def backward(rank: int, position: int) -> Action:
        group, within = divmod(position, pp * stages_per_rank)
        return Action((stages_per_rank - 1 - within // pp) * pp + rank, "B", group * pp + within % pp)

    ranks = []
    for rank in range(pp):
        num_warmup = min(2 * (pp - rank - 1) + (stages_per_rank - 1) * pp, total)
        actions = [forward(rank, position) for position in range(num_warmup)]
        for position in range(total - num_warmup):
            actions += [forward(rank, num_warmup + position), backward(rank, position)]
        actions += [backward(rank, position) for position in range(total - num_warmup, total)]
        ranks.append(tuple(actions))
    return Schedule("interleaved-1f1b", num_micro_batches, tuple(ranks))
