"""Shapes that operations return, against torch's own rules for the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipekit.layers.shapes import _RULES, ShapeRules, infer

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int64)


HALF = torch.bfloat16
X = meta(2, 3, 4)
TURNED = X.transpose(0, 1)
STATISTICS = meta(2, 3, 1)
MEAN, SUM = 1, 2

CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.mm.default, (meta(2, 3), meta(3, 5)), {}),
    (aten.addmm.default, (meta(5), meta(2, 3), meta(3, 5)), {}),
    (aten.bmm.default, (meta(7, 2, 3), meta(7, 3, 5)), {}),
    (aten.add.Tensor, (X, meta(4)), {}),
    (aten.add.Tensor, (meta(4), X), {"alpha": 2}),
    (aten.add.Tensor, (X, TURNED.transpose(0, 1)), {}),
    (aten.mul.Tensor, (TURNED, 2.0), {}),
    (aten.mul.Tensor, (meta(2, 1), meta(1, 3)), {}),
    (aten.div.Scalar, (X.to(HALF), 2.0), {}),
    (aten.gelu.default, (TURNED,), {"approximate": "tanh"}),
    (aten.gelu.default, (X[:, ::2],), {}),
    (aten.gelu_backward.default, (X, X), {}),
    (aten.tanh.default, (meta(0, 3),), {}),
    (aten.native_layer_norm.default, (X, [4], meta(4), meta(4), 1e-5), {}),
    (aten.native_layer_norm.default, (X.to(HALF), [3, 4], None, None, 1e-5), {}),
    (aten.native_layer_norm_backward.default, (X, X, [4], STATISTICS, STATISTICS, meta(4), meta(4), [True] * 3), {}),
    (aten.embedding.default, (meta(9, 4), ids(2, 3)), {}),
    (aten.embedding_dense_backward.default, (X, ids(2, 3), 9, -1, False), {}),
    (aten.native_dropout.default, (X, 0.1, True), {}),
    (aten.native_dropout_backward.default, (X, meta(2, 3, 4, dtype=torch.bool), 1.1), {}),
    (aten.sum.dim_IntList, (X, [0, -1]), {}),
    (aten.sum.dim_IntList, (X, [1], True), {}),
    (aten.mean.dim, (X, [-1], True), {}),
    (aten.pow.Tensor_Scalar, (X, 2), {}),
    (aten.masked_fill.Scalar, (TURNED, meta(4, dtype=torch.bool), 0.0), {}),
    (aten.tril.default, (meta(4, 3),), {}),
    (aten.triu.default, (meta(4, 3), 1), {}),
    (aten.cat.default, ([X, X], -1), {}),
    (aten.cat.default, ([meta(2, 3), meta(5, 3)],), {}),
    (aten.randn.default, ([2, 3],), {"device": torch.device("meta"), "pin_memory": False}),
    (aten.rand.default, ([2, 3],), {"device": torch.device("meta"), "dtype": HALF}),
    (aten._to_copy.default, (TURNED,), {"dtype": HALF}),
    (aten._softmax.default, (TURNED, -1, False), {}),
    (aten._log_softmax.default, (X, 1, False), {}),
    (aten._softmax_backward_data.default, (X, X, -1, torch.float32), {}),
    (aten._log_softmax_backward_data.default, (X, X, -1, torch.float32), {}),
    (aten.nll_loss_forward.default, (meta(6, 9), ids(6), None, MEAN, -100), {}),
    (aten.nll_loss_backward.default, (meta(), meta(6, 9), ids(6), None, SUM, -100, meta()), {}),
    (aten.empty_like.default, (TURNED,), {}),
    (aten.zeros_like.default, (meta(3, 1).expand(3, 5),), {"dtype": HALF}),
    (aten.ones_like.default, (meta(),), {"memory_format": torch.preserve_format}),
    (aten.new_zeros.default, (X, [5, 1]), {"dtype": HALF}),
    (aten.clone.default, (TURNED,), {}),
    (aten.clone.default, (TURNED,), {"memory_format": torch.contiguous_format}),
    (aten.stack.default, ([X, X, X], -1), {}),
    (aten.slice_backward.default, (X, [2, 9, 4], 1, 0, 3, 1), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), CASES, ids=[f"{idx}-{case[0]}" for idx, case in enumerate(CASES)])
def test_a_rule_returns_what_torch_returns(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert func in _RULES
    ours, theirs = infer(func, args, kwargs), func(*args, **kwargs)
    assert ours is not None
    for own, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if own is None:
            assert other is None
            continue
        assert (own.shape, own.dtype, own.stride()) == (other.shape, other.dtype, other.stride())
        assert own.device.type == "meta"


@pytest.mark.parametrize(
    "run",
    [
        lambda: meta(2, 3) @ meta(4, 5),
        lambda: torch.add(meta(2, 3), meta(4)),
        lambda: torch.addmm(meta(3), meta(2, 3), meta(3, 5)),
        lambda: torch.mm(meta(2, 3), meta(3, 5, dtype=HALF)),
        lambda: meta(2).add_(meta(3)),
        lambda: torch.nn.functional.layer_norm(meta(2, 3), (4,)),
        lambda: torch.stack([meta(2), meta(3)]),
        lambda: torch.cat([meta(2, 3), meta(3, 4)]),
        lambda: meta(2, 3).masked_fill(meta(4, dtype=torch.bool), 0.0),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_torch(run: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError), ShapeRules():
        run()


def test_types_are_promoted_by_torch() -> None:
    with ShapeRules():
        assert torch.add(meta(2, dtype=HALF), meta(2)).dtype == torch.float32
        assert torch.add(ids(2), 1).dtype == torch.int64
        assert torch.mul(ids(2), 1.5).dtype == torch.float32


def test_values_are_computed_on_a_device() -> None:
    with ShapeRules():
        assert torch.mm(torch.ones(1, 2), torch.ones(2, 1)).item() == 2


def test_initial_weights_cost_nothing_on_the_meta_device() -> None:
    with ShapeRules():
        weight = torch.nn.init.normal_(meta(3, 4))
    assert weight.shape == (3, 4)
