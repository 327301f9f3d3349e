"""Time of kernels, against products that were measured and against what can be worked out by hand."""

from __future__ import annotations

from math import log, sqrt

import pytest

from pipekit.predictions.devices import find_device
from pipekit.predictions.kernels import SUSTAINED, Attention, Product, Work, memory_s, product_s, work_s

H100 = find_device("h100")

# Batch, rows, columns and inner size of products in bf16, and their operations a second in 10^12 on an H100.
# Source: `matmul_interpolator_data.h` of OpenXLA (sm_90).
MEASURED = [
    (1, 256, 2048, 256, 41.8), (4, 512, 256, 256, 42.4), (2, 1024, 256, 4096, 306.4), (1, 2048, 256, 1024, 135.8),
    (1, 512, 2048, 1024, 232.6), (1, 4096, 512, 512, 238.8), (2, 256, 2048, 2048, 332.2), (1, 1024, 1024, 2048, 350.0),
    (1, 4096, 4096, 256, 392.2), (1, 4096, 2048, 512, 447.0), (2, 1024, 2048, 1024, 493.4), (4, 4096, 256, 2048, 588.7),
    (4, 1024, 1024, 2048, 626.1), (1, 2048, 2048, 2048, 632.0), (4, 4096, 1024, 1024, 673.8),
    (4, 1024, 2048, 2048, 712.7), (2, 4096, 512, 4096, 729.7), (2, 4096, 4096, 2048, 763.0),
    (1, 4096, 4096, 4096, 783.3),
]  # fmt: skip


def test_products_of_all_sizes_take_as_long_as_they_were_measured() -> None:
    # On its own a product is faster than in steps of many, and on this device than the share of the peak of the table.
    alone = H100.model_copy(update={"efficiency": 0.9 / SUSTAINED})
    errors = []
    for batch, m, n, k, tflops in MEASURED:
        measured_s = 2 * batch * m * n * k / tflops / 1e12
        errors.append(log(product_s(Product(batch, m, n, k), alone, "bf16") / measured_s))
    assert sqrt(sum(error**2 for error in errors) / len(errors)) < 0.10
    assert max(map(abs, errors)) < 0.25


def test_one_tile_more_than_there_are_processors_takes_another_round() -> None:
    number = H100.processors or 0

    def seconds(num_tiles: int) -> float:
        # Long sums, beside which the start of a kernel is nothing, on a device whose memory is no limit.
        on = H100.model_copy(update={"memory_bandwidth": 1e18})
        return product_s(Product(num_tiles, 128, 64, 10**6), on, "bf16")

    assert seconds(1) == pytest.approx(seconds(number))
    assert seconds(number + 1) == pytest.approx(2 * seconds(number), rel=0.01)


def test_narrow_products_take_as_long_as_their_bytes() -> None:
    product = Product(1, 1, 8192, 8192)
    seconds = product_s(product, H100.model_copy(update={"memory_bandwidth": 1e9}), "bf16")
    assert seconds == pytest.approx(2 * 8192 * 8194 / 0.85e9, rel=0.01)


def test_an_attention_is_as_fast_as_it_is_long_and_leaves_out_what_is_hidden() -> None:
    a100 = find_device("a100-80gb")

    def tflops(length: int, *, is_causal: bool = False) -> float:
        flops = 10**15
        return flops / work_s(Work(attentions=(Attention(flops, length, is_causal),)), a100, "bf16") / 1e12

    # Dao 2023, "FlashAttention-2", figure 4: forward and backward, heads of 64, without a mask.
    for length, published in ((512, 132), (1024, 163), (2048, 171), (16384, 176)):
        assert tflops(length) == pytest.approx(SUSTAINED * published, rel=0.1)
    assert tflops(2048, is_causal=True) == pytest.approx(2 * tflops(2048), rel=0.01)


def test_other_kernels_take_their_bytes_and_other_products_their_operations() -> None:
    convolution_s = work_s(Work(other_flops=10**12), H100, "bf16")
    assert convolution_s == pytest.approx(10**12 / (SUSTAINED * H100.matmul_flops("bf16")))
    assert work_s(Work(moved_bytes=10**9, num_kernels=3), H100, "bf16") == pytest.approx(memory_s(10**9, H100) + 6e-6)


@pytest.mark.parametrize(
    ("product", "sums_tokens", "part"),
    [
        (Product(1, 2048, 4096, 1024), False, Product(1, 2048, 1024, 1024)),  # to the inner size
        (Product(1, 2048, 1024, 4096), False, Product(1, 2048, 1024, 1024)),  # and back
        (Product(1, 4096, 1024, 2048), True, Product(1, 1024, 1024, 2048)),
        (Product(1, 1024, 4096, 2048), True, Product(1, 1024, 1024, 2048)),
        (Product(16, 2048, 2048, 64), False, Product(4, 2048, 2048, 64)),
    ],
)
def test_ranks_share_a_product_along_the_longer_side_of_the_weight(
    product: Product, sums_tokens: bool, part: Product
) -> None:
    whole = Work((product,), (Attention(100, 8, True),), 40, moved_bytes=80, whole_bytes=16, num_kernels=2)
    shared = whole.shared(4, sequence_parallel=True, sums_tokens=sums_tokens)
    assert shared == Work((part,), (Attention(25, 8, True),), 10, 20, 4, 2)
    # Without sequence parallelism each moves all of what passes between layers.
    assert whole.shared(4, sequence_parallel=False).moved_bytes == 16 + 64 // 4
    assert whole.shared(1, sequence_parallel=False) is whole
