"""Counter of floating-point operations: torch's, with what it does not know or counts twice."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def attention_flops(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Operations of fused attention, for all pairs of positions.

    Args:
        query, key, value: shapes `(B, H, S, D)`, `(B, H, T, D)` and `(B, H, T, G)`.

    Example:
        >>> attention_flops((1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4)) == 2 * (2 * 2 * 8 * 8 * 4)
        True
    """
    batch, heads, length, size = query
    return 2 * batch * heads * length * key[2] * (size + value[3])


def attention_backward_flops(gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Operations of the backward of fused attention, without the product that it makes again to save memory."""
    return 2 * attention_flops(query, key, value)


def product_flops(added: Shape, left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    """Operations of a product `(..., N, K)` by `(..., K, M)` that is added to a tensor in place."""
    return 2 * prod(left) * right[-1]


_aten = torch.ops.aten
_OPERATIONS = {
    # Of CPUs.
    _aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    # Counted by torch with the product that they make again.
    _aten._scaled_dot_product_flash_attention_backward: attention_backward_flops,
    _aten._scaled_dot_product_efficient_attention_backward: attention_backward_flops,
    _aten._scaled_dot_product_cudnn_attention_backward: attention_backward_flops,
    # Weight gradients are added in place.
    _aten.addmm_: product_flops,
    _aten.baddbmm_: product_flops,
}


def make_flop_counter() -> FlopCounterMode:
    """Return a counter of matrix products, convolutions and attention: two operations for each multiplication.

    Example:
        >>> with make_flop_counter() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> counter.get_total_flops()
        48
    """
    return FlopCounterMode(display=False, custom_mapping=_OPERATIONS)
