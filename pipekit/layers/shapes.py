"""Output shapes of the most common operations on the meta device.

Torch's own rules for the meta device are written in Python, and import its compiler when the first of them runs, which
takes longer than describing a model. So `infer` has rules for the operations of a GPT, and leaves all others to torch.

Shapes: M, K, N rows, inner size and columns of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_UNARY = "gelu relu silu sigmoid tanh neg exp log sqrt rsqrt sin cos square abs"
_BINARY = "add sub mul div gelu_backward threshold_backward silu_backward sigmoid_backward tanh_backward"
_IN_PLACE = "normal_ uniform_ zero_ fill_ copy_ add_ mul_ div_ sub_ relu_"


def infer(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Result of an operation such as `torch.ops.aten.mm.default` on meta tensors, or None if torch must compute it.

    Example:
        >>> a, b = torch.empty(2, 3, device="meta"), torch.empty(3, 5, device="meta")
        >>> infer(torch.ops.aten.mm.default, (a, b), {}).shape
        torch.Size([2, 5])
    """
    rule = _RULES.get(func)
    if rule is None:
        return None
    tensors = [item for value in args for item in (value if isinstance(value, (list, tuple)) else (value,))]
    if any(isinstance(tensor, Tensor) and tensor.device.type != "meta" for tensor in tensors):
        return None
    return rule(*args, **kwargs)


class ShapeRules(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager in which `infer` computes operations on meta tensors, where it has a rule."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler, only to keep it away from here.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = infer(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if results is None else results


def _new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device="meta")


def _like(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of the same shape, laid out in the same order where that has no gaps."""
    order = sorted(range(x.dim()), key=lambda dim: (x.stride(dim), x.shape[dim]), reverse=True)
    strides, step = [0] * x.dim(), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= x.shape[dim]
    if any(stride != x.stride(dim) for dim, stride in enumerate(strides) if x.shape[dim] > 1):
        return _new(x, *x.shape, dtype=dtype)
    return torch.empty_strided(x.shape, strides, dtype=dtype or x.dtype, device="meta")


def _is_plain(kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("device") in (None, torch.device("meta")) and kwargs.get("layout") is None


def _filled_like(x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Result of `empty_like`, `zeros_like` and their kin."""
    is_same_form = kwargs.get("memory_format") in (None, torch.preserve_format)
    return _like(x, dtype=kwargs.get("dtype")) if _is_plain(kwargs) and is_same_form else None


def _new_filled(x: Tensor, shape: Sequence[int], **kwargs: Any) -> Tensor | None:
    return _new(x, *shape, dtype=kwargs.get("dtype")) if _is_plain(kwargs) else None


def _clone(x: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor | None:
    if memory_format is torch.contiguous_format:
        return _new(x, *x.shape)
    return _like(x) if memory_format in (None, torch.preserve_format) else None


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if any(tensor.shape != first.shape or tensor.dtype != first.dtype for tensor in tensors):
        return None
    shape = list(first.shape)
    shape.insert(dim % (first.dim() + 1), len(tensors))
    return _new(first, *shape)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if not first.dim():
        return None
    shapes = [list(tensor.shape) for tensor in tensors]
    joined = sum(shape.pop(dim) if len(shape) == first.dim() else 0 for shape in shapes)
    if any(shape != shapes[0] for shape in shapes) or any(
        tensor.dtype != first.dtype or not tensor.is_contiguous() for tensor in tensors
    ):
        return None
    return _new(first, *(joined if axis == dim % first.dim() else size for axis, size in enumerate(first.shape)))


def _made(shape: Sequence[int], **kwargs: Any) -> Tensor | None:
    """Result of `randn` and `rand`."""
    if kwargs.get("device") is None or not _is_plain(kwargs):
        return None
    return torch.empty(shape, dtype=kwargs.get("dtype") or torch.get_default_dtype(), device="meta")


def _masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor | None:
    return _new(x, *x.shape) if _broadcast([tuple(x.shape), tuple(mask.shape)]) == tuple(x.shape) else None


def _check_types(a: Tensor, b: Tensor) -> None:
    # Torch's rule for the meta device forgives it; no device does.
    if a.dtype != b.dtype:
        raise RuntimeError(f"a product of {a.dtype} and {b.dtype}; both must be of one type")


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    _check_types(a, b)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        return None
    return _new(a, a.shape[0], b.shape[1])  # (M, K) (K, N) to (M, N)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor | None:
    if kwargs or bias.dtype != a.dtype or bias.dim() != 1 or bias.shape[0] not in (1, b.shape[-1]):
        return None
    return _mm(a, b)


def _bmm(a: Tensor, b: Tensor) -> Tensor | None:
    _check_types(a, b)
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        return None
    return _new(a, a.shape[0], a.shape[1], b.shape[2])


def _pointwise(*args: Any, **kwargs: Any) -> Tensor | None:
    tensors = [value for value in args if isinstance(value, Tensor)]
    dtype = tensors[0].dtype
    if not dtype.is_floating_point or any(tensor.dtype != dtype for tensor in tensors):
        return None
    if any(isinstance(value, complex) for value in args) or kwargs.keys() - {"alpha", "approximate"}:
        return None
    shape = _broadcast([tuple(tensor.shape) for tensor in tensors])
    if shape is None:
        return None
    whole = next((tensor for tensor in tensors if tuple(tensor.shape) == shape), None)
    return _new(tensors[0], *shape) if whole is None else _like(whole)


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    length = max(map(len, shapes))
    result = []
    for sizes in zip(*((1,) * (length - len(shape)) + shape for shape in shapes), strict=True):
        wider = {size for size in sizes if size != 1}
        if len(wider) > 1:
            return None
        result.append(wider.pop() if wider else 1)
    return tuple(result)


def _in_place(changed: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    shape = tuple(changed.shape)
    fits = all(_broadcast([shape, tuple(value.shape)]) == shape for value in args if isinstance(value, Tensor))
    return changed if fits else None


def _layer_norm(
    x: Tensor, normalized: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...] | None:
    kept = x.dim() - len(normalized)
    if tuple(x.shape[kept:]) != tuple(normalized) or any(
        tensor is not None and tensor.shape != x.shape[kept:] for tensor in (weight, bias)
    ):
        return None
    statistics = (*x.shape[:kept], *(1 for _ in normalized))
    # GPUs keep the statistics of 16-bit inputs in fp32.
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return _new(x, *x.shape), _new(x, *statistics, dtype=dtype), _new(x, *statistics, dtype=dtype)


def _layer_norm_backward(grad: Tensor, x: Tensor, normalized: Sequence[int], *args: Any) -> tuple[Tensor | None, ...]:
    shapes, mask = (x.shape, normalized, normalized), args[-1]
    return tuple(_new(x, *shape) if needed else None for shape, needed in zip(shapes, mask, strict=True))


def _embedding(weight: Tensor, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    return _new(weight, *ids.shape, weight.shape[1]) if weight.dim() == 2 else None


def _sum(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if not x.dtype.is_floating_point:
        return None
    summed = {dim % x.dim() for dim in dims} if dims else set(range(x.dim()))
    shape = [1 if dim in summed else size for dim, size in enumerate(x.shape) if keepdim or dim not in summed]
    return _new(x, *shape, dtype=dtype)


def _convert(x: Tensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor | None:
    return None if kwargs or dtype is None else _like(x, dtype=dtype)


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor | None:
    return None if half_to_float else _new(x, *x.shape)


def _softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor | None:
    return _new(grad, *grad.shape) if grad.dtype == dtype else None


def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int) -> Any:
    if reduction == 0 or x.dim() != 2 or target.shape != x.shape[:1] or target.dtype != torch.int64:
        return None
    return _new(x), _new(x)


def _overloads(names: str, rule: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    packets = [getattr(torch.ops.aten, name) for name in names.split()]
    plain = ("default", "Tensor", "Scalar")
    return {getattr(packet, name): rule for packet in packets for name in packet.overloads() if name in plain}


_aten = torch.ops.aten
_RULES: dict[Any, Callable[..., Any]] = {
    **_overloads(_UNARY, _pointwise),
    **_overloads(_BINARY, _pointwise),
    **_overloads(_IN_PLACE, _in_place),
    _aten.empty_like.default: _filled_like,
    _aten.zeros_like.default: _filled_like,
    _aten.ones_like.default: _filled_like,
    _aten.new_empty.default: _new_filled,
    _aten.new_zeros.default: _new_filled,
    _aten.randn.default: _made,
    _aten.rand.default: _made,
    _aten.clone.default: _clone,
    _aten.cat.default: _cat,
    _aten.tril.default: lambda x, *args: _like(x),
    _aten.triu.default: lambda x, *args: _like(x),
    _aten.masked_fill.Scalar: _masked_fill,
    _aten.pow.Tensor_Scalar: _pointwise,
    _aten.stack.default: _stack,
    _aten.slice_backward.default: lambda grad, shape, *args: _new(grad, *shape),
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten.embedding.default: _embedding,
    _aten.embedding_dense_backward.default: lambda grad, ids, rows, *args: _new(grad, rows, grad.shape[-1]),
    _aten.native_dropout.default: lambda x, p, train: (_like(x), _like(x, dtype=torch.bool)),
    _aten.native_dropout_backward.default: lambda grad, mask, scale: _like(grad),
    _aten.sum.dim_IntList: _sum,
    _aten.mean.dim: _sum,
    _aten._to_copy.default: _convert,
    _aten._softmax.default: _softmax,
    _aten._log_softmax.default: _softmax,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._log_softmax_backward_data.default: _softmax_backward,
    _aten.nll_loss_forward.default: _nll_loss,
    _aten.nll_loss_backward.default: lambda grad, x, *args: _new(x, *x.shape),
}
