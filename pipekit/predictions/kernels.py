"""Time of a layer's kernels on a GPU: matrix products by their shapes, attention by its length, and bytes of memory.

Shapes: M, N rows and columns of a product, K the size that it sums over; S sequence length.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import ceil

from pipekit.predictions.devices import Device, MatmulFormat
from pipekit.predictions.elements import BYTES_PER_ELEMENT

SUSTAINED = 0.86
"""Share of the speed of a kernel on its own that a device keeps through steps of many, within its limits of power and
heat. It is fitted on the ten runs of Narayanan et al. 2021, table 1."""

# A processor computes tiles of so many rows and columns, one after the other: a product of one tile more than there are
# processors takes as long as one of twice as many. With the starts below, this is within 9 % (root mean square) of 57
# products of sizes from 256 to 4,096 that were measured on an H100: `matmul_interpolator_data.h` of OpenXLA.
_TILE_SIZES = (128, 64)
# To begin and end a tile takes as long as so many more terms of its sums.
_TILE_START = 128
_START_S = 6e-6
# Seconds from the end of one small kernel to the start of the next.
_NEXT_S = 2e-6
# Kernels that read and write long tensors in order reach this share of the bandwidth: BabelStream has 1.40e12 bytes
# a second of 1.555e12 on an A100, and some are no such kernels.
_MEMORY_SHARE = 0.85
# Sequence length at which a fused attention is half as fast as for long sequences: it is at 132 TFLOP/s for 512 tokens
# and at 176 for 16,384 on an A100. Source: Dao 2023, "FlashAttention-2", figure 4.
_HALF_LENGTH = 170


@dataclass(frozen=True)
class Product:
    """A matrix product `(M, K) x (K, N)`, or `batch` of them in one kernel."""

    batch: int
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Attention:
    """A fused attention.

    Attributes:
        flops: operations of all queries on all keys.
        length: number of keys.
        is_causal: whether a query sees only the keys before it, so that half of the operations are left out.
    """

    flops: int
    length: int
    is_causal: bool


@dataclass(frozen=True)
class Work:
    """Kernels of one pass over a layer: its forward, its input gradient or its weight gradient.

    Attributes:
        products: matrix products.
        attentions: fused attentions.
        other_flops: operations of other products, such as convolutions.
        moved_bytes: bytes that the other kernels read and write.
        whole_bytes: those of them that move tensors that pass between layers, or are computed from these token by
            token, which tensor-parallel ranks without sequence parallelism each move whole.
        num_kernels: number of the other kernels.
    """

    products: tuple[Product, ...] = ()
    attentions: tuple[Attention, ...] = ()
    other_flops: int = 0
    moved_bytes: int = 0
    whole_bytes: int = 0
    num_kernels: int = 0

    @property
    def flops(self) -> int:
        """Operations; a multiplication and an addition are two."""
        products = sum(2 * each.batch * each.m * each.n * each.k for each in self.products)
        return products + sum(each.flops for each in self.attentions) + self.other_flops

    def __sub__(self, other: Work) -> Work:
        """Kernels of this work that are not in the other, which is a part of it."""
        return Work(
            tuple((Counter(self.products) - Counter(other.products)).elements()),
            tuple((Counter(self.attentions) - Counter(other.attentions)).elements()),
            max(0, self.other_flops - other.other_flops),
            max(0, self.moved_bytes - other.moved_bytes),
            max(0, self.whole_bytes - other.whole_bytes),
            max(0, self.num_kernels - other.num_kernels),
        )

    def shared(self, tp: int, *, sequence_parallel: bool, sums_tokens: bool = False) -> Work:
        """Return the part of one of `tp` tensor-parallel ranks.

        Of a product with a weight, the longer side of the weight is shared out, which is that of its heads, of its
        inner size or of the vocabulary; of several products in one kernel, a part of them.

        Args:
            tp: number of ranks.
            sequence_parallel: whether tensors that pass between layers are shared out too.
            sums_tokens: whether products sum over tokens, as those of weight gradients do.
        """
        if tp == 1:
            return self
        whole = 0 if sequence_parallel else self.whole_bytes
        return Work(
            tuple(_share(product, tp, sums_tokens=sums_tokens) for product in self.products),
            tuple(replace(attention, flops=attention.flops // tp) for attention in self.attentions),
            self.other_flops // tp,
            whole + (self.moved_bytes - whole) // tp,
            self.whole_bytes if whole else self.whole_bytes // tp,
            self.num_kernels,
        )


@dataclass(frozen=True)
class LayerWork:
    """Kernels of a layer for one micro-batch, by pass.

    Attributes:
        forward: of the forward.
        input_gradient: of the gradient of its input.
        weight_gradient: of the gradients of its parameters.
        recomputed: those of the forward up to the last tensor that its backward keeps, with which recomputation ends.
    """

    forward: Work
    input_gradient: Work
    weight_gradient: Work
    recomputed: Work

    def shared(self, tp: int, *, sequence_parallel: bool) -> LayerWork:
        """Return the part of one of `tp` tensor-parallel ranks."""
        return LayerWork(
            self.forward.shared(tp, sequence_parallel=sequence_parallel),
            self.input_gradient.shared(tp, sequence_parallel=sequence_parallel),
            self.weight_gradient.shared(tp, sequence_parallel=sequence_parallel, sums_tokens=True),
            self.recomputed.shared(tp, sequence_parallel=sequence_parallel),
        )


def work_s(work: Work, device: Device, matmul_format: MatmulFormat) -> float:
    """Seconds of some kernels, one after the other."""
    assert device.processors is not None, "only of a device that says how many it has"
    seconds = sum(product_s(product, device, matmul_format) for product in work.products)
    for attention in work.attentions:
        share = SUSTAINED * device.attention_efficiency * attention.length / (attention.length + _HALF_LENGTH)
        flops = attention.flops / 2 if attention.is_causal else attention.flops
        seconds += _START_S + flops / (share * getattr(device.peak_flops, matmul_format))
    seconds += work.other_flops / (SUSTAINED * device.matmul_flops(matmul_format))
    return seconds + work.num_kernels * _NEXT_S + memory_s(work.moved_bytes, device)


def product_s(product: Product, device: Device, matmul_format: MatmulFormat) -> float:
    """Seconds of a matrix product: the tiles that a processor computes, or the bytes that are moved.

    Example:
        >>> from pipekit.predictions.devices import find_device
        >>> seconds = product_s(Product(1, 4096, 4096, 4096), find_device("h100"), "bf16")
        >>> round(2 * 4096**3 / seconds / 1e12)
        625
    """
    batch, m, n, k = product.batch, product.m, product.n, product.k
    processors = device.processors or 1
    long, short = _TILE_SIZES
    tiles = batch * min(ceil(m / long) * ceil(n / short), ceil(m / short) * ceil(n / long))
    rounds = ceil(tiles / processors)
    flops = 2 * rounds * processors * long * short * (k + _TILE_START)
    element_bytes = BYTES_PER_ELEMENT["fp32" if matmul_format == "tf32" else matmul_format]
    num_bytes = batch * element_bytes * (m * k + k * n + m * n)
    return _START_S + max(flops / (SUSTAINED * device.matmul_flops(matmul_format)), memory_s(num_bytes, device))


def memory_s(num_bytes: float, device: Device) -> float:
    """Seconds in which a device reads and writes so many bytes of its memory."""
    return num_bytes / (device.memory_bandwidth * _MEMORY_SHARE)


def _share(product: Product, tp: int, *, sums_tokens: bool) -> Product:
    if product.batch > 1:
        return replace(product, batch=ceil(product.batch / tp))
    first = product.m if sums_tokens else product.k
    if product.n > first:
        return replace(product, n=ceil(product.n / tp))
    return replace(product, m=ceil(first / tp)) if sums_tokens else replace(product, k=ceil(first / tp))
