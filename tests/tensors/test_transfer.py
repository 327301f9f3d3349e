from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipekit.tensors.transfer import pack, to_device

# Not equal to the device of a tensor, so that tensors are moved there.
CPU = torch.device("cpu", 0)
BATCHES = [
    {"ids": torch.arange(6).reshape(2, 3), "mask": torch.tensor([True, False, True]), "name": "a"},
    (torch.tensor(0.5, dtype=torch.bfloat16), [torch.tensor([1 + 2j])], None, torch.empty(0, 4)),
]


class Copies(TorchDispatchMode):
    """Notes how many bytes each copy to another device has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.sizes.append(args[0].nbytes)
            assert kwargs["non_blocking"]
        return func(*args, **(kwargs or {}))


def copies_to_meta(value: Any) -> list[int]:
    with Copies() as copies:
        to_device(value, torch.device("meta"))
    return copies.sizes


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    elif isinstance(theirs, (list, tuple, dict)):
        assert type(ours) is type(theirs)
        keys = theirs if isinstance(theirs, dict) else range(len(theirs))
        for key in keys:
            assert_same(ours[key], theirs[key])
    else:
        assert ours == theirs


def test_packing_and_moving_change_no_value() -> None:
    assert_same(pack(BATCHES), BATCHES)
    assert_same(to_device(pack(BATCHES), CPU), BATCHES)
    assert_same(to_device(BATCHES, CPU), BATCHES)
    assert_same(pack(()), ())


def test_what_was_packed_is_copied_at_once() -> None:
    packed = pack(BATCHES)
    assert copies_to_meta(packed) == [packed[0]["ids"].untyped_storage().nbytes()]


def test_a_batch_in_slices_is_copied_at_once() -> None:
    batch = torch.arange(64).reshape(8, 8)
    slices = list(batch.t().split(2))
    assert copies_to_meta(slices) == [batch.nbytes]
    assert_same(to_device(slices, CPU), slices)


@pytest.mark.parametrize("value", [torch.arange(64)[:31], torch.zeros(4, requires_grad=True), torch.eye(2).to_sparse()])
def test_other_tensors_are_copied_by_themselves(value: Tensor) -> None:
    moved = to_device(value, CPU)
    assert_same(moved, value)
    assert moved.requires_grad == value.requires_grad
    if value.layout == torch.strided:
        assert copies_to_meta(value) == [value.nbytes]
