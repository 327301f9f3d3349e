"""The precision of matrix products of fp32."""

from __future__ import annotations

import pytest
import torch

from pipekit.tensors.fp32_products import fp32_products


@pytest.mark.parametrize(
    ("device", "tf32", "inside"), [("cuda", True, "high"), ("cuda", False, "highest"), ("cpu", True, "highest")]
)
def test_gpus_alone_multiply_in_tf32_and_only_inside(device: str, tf32: bool, inside: str) -> None:
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    with fp32_products(torch.device(device), tf32=tf32):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == before
