"""Sparse attention, against dense attention with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipekit.costs.describe import describe_layers
from pipekit.layers.specs import LayerSpec
from pipekit.models import find_families
from pipekit.models.sparsity import BlockLayouts, SparseAttention
from pipekit.models.transformer.cache import KeyValueCache, caching_modules
from pipekit.models.transformer.flex import attend_flexibly
from pipekit.models.transformer.sparse import HeadLayouts, Weighing, attend_sparsely
from pipekit.tensor_parallel import TensorGroup, whole_outputs
from tensor_parallel.outcomes import VOCAB, random_weights
from tensor_parallel.sharded_model import CutModel
from tensor_parallel.threads import run_ranks

MODES: dict[str, dict[str, Any]] = {
    "fixed": {"mode": "fixed", "num_local_blocks": 2},
    "fixed, heads of their own": {
        "mode": "fixed",
        "num_local_blocks": 4,
        "different_layout_per_head": True,
        "num_different_global_patterns": 4,
    },
    "variable": {
        "mode": "variable",
        "local_window_blocks": (1, 3),
        "global_block_indices": (2,),
        "num_random_blocks": 1,
    },
    "bigbird": {"mode": "bigbird"},
    "bigbird, heads of their own": {"mode": "bigbird", "different_layout_per_head": True, "seed": 3},
    "bslongformer": {"mode": "bslongformer", "global_block_indices": (0, 5), "global_block_end_indices": (1, 7)},
}
LENGTH = 331
"""More than two chunks, and a block that is not full."""


def layouts_of(mode: str, num_heads: int, num_positions: int = LENGTH, block: int = 8) -> HeadLayouts:
    settings = SparseAttention(block=block, **MODES[mode])
    return HeadLayouts(BlockLayouts(settings, num_heads, num_positions), 0, num_heads)


def dense_mask(layouts: BlockLayouts, length: int) -> Tensor:
    """Mask `(H, S, S)` of all heads, from the layouts by hand."""
    tables = torch.from_numpy(layouts.tables())
    whole = torch.kron(tables.int(), torch.ones(layouts.block, layouts.block, dtype=torch.int32)).bool()
    whole = whole[:, :length, :length].tril()
    return torch.stack([whole[head % len(whole)] for head in range(layouts.num_heads)])


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    scores = scale * q @ k.mT
    scores = scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def random_heads(num_kv_heads: int = 4, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads, 8) for heads in (4, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def with_gradients(y: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [y, *torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=generator, dtype=y.dtype))]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all at once": {"num_kv_heads": 2, "soft_cap": 1.5, "window": 150, "documents": True},
}


@pytest.mark.parametrize("options", ["all at once", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_gradients_are_those_of_dense_attention(mode: str, options: str) -> None:
    settings = OPTIONS[options]
    inputs, layouts = random_heads(settings.get("num_kv_heads", 4)), layouts_of(mode, 4)
    mask = dense_mask(layouts.of_model, LENGTH)
    documents, window = None, settings.get("window")
    if settings.get("documents"):
        documents = (torch.arange(LENGTH) // torch.tensor([[70], [400]])).int()
        mask = mask & (documents[:, None, :, None] == documents[:, None, None])
    if window is not None:
        mask = mask & torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1 - window)
    weighing = Weighing(0.3, settings.get("soft_cap"), window)
    found = with_gradients(attend_sparsely(*inputs, layouts, weighing, documents), inputs)
    expected = with_gradients(dense_attention(*inputs, mask, 0.3, settings.get("soft_cap")), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_under_dropout_are_those_of_finite_differences() -> None:
    layouts = layouts_of("fixed, heads of their own", 4, 12, block=2)
    weighing = Weighing(0.3, 2.0, dropout=0.3, seed=5)
    inputs = random_heads(2, 12, torch.float64)
    assert torch.autograd.gradcheck(lambda *heads: attend_sparsely(*heads, layouts, weighing), inputs, fast_mode=True)


def test_dropout_leaves_the_mean_and_drops_other_weights_under_another_seed() -> None:
    q, k, _ = random_heads(length=64)
    layouts, ones = layouts_of("bigbird", 4, 64), torch.ones(2, 4, 64, 8)
    first, second, same = (
        attend_sparsely(q, k, ones, layouts, Weighing(0.3, dropout=0.25, seed=seed)) for seed in (1, 2, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, second)
    assert first.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mode", ["fixed, heads of their own", pytest.param("bigbird", marks=pytest.mark.slow)])
def test_flex_attention_attends_to_the_same(mode: str) -> None:
    q, k, v = (tensor.detach() for tensor in random_heads(2, 96))
    layouts, documents = layouts_of(mode, 4, 96), (torch.arange(96) // 60).expand(2, -1)
    found = attend_flexibly(
        q, k, v, documents=documents, layouts=layouts, window=96, scale=0.3, soft_cap=None, compiles=False
    )
    torch.testing.assert_close(found, attend_sparsely(q, k, v, layouts, Weighing(0.3), documents))


class _Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operator makes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(tensor, Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return results


@pytest.mark.parametrize("mode", ["fixed", "bslongformer"])
def test_no_tensor_is_near_as_large_as_all_scores(mode: str) -> None:
    inputs, layouts = random_heads(length=2048), layouts_of(mode, 4, 2048, block=32)
    with _Largest() as largest:
        attend_sparsely(*inputs, layouts, Weighing(0.3)).sum().backward()
    assert largest.num_bytes <= 2 * 4 * 2048 * 2048 * 4 / 16


SIZES: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 48, "vocab_size": VOCAB}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2, bigbird": {"family": "gpt2", "num_kv_heads": 2, "sparse_attention": {**MODES["bigbird"], "block": 4}},
    "gpt_neox, fixed": {"family": "gpt_neox", "sparse_attention": {**MODES["fixed, heads of their own"], "block": 2}},
    "llama, sliding window": {"family": "llama", "sparse_attention": {"mode": "sliding_window", "window": 7}},
    "gemma2, bslongformer": {
        "family": "gemma2",
        "sliding_window": 20,
        "sparse_attention": {**MODES["bslongformer"], "block": 4},
    },
}
TOKENS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


def specs_of(model: str, **changes: Any) -> list[LayerSpec]:
    settings = {**SIZES, **MODELS[model], **changes}
    return find_families()[settings.pop("family")](**settings).layer_specs()


@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallel_ranks_attend_as_one_process_does(model: str) -> None:
    specs = specs_of(model)
    weights = random_weights(specs)
    alone = CutModel(specs, None, sequence_parallel=False, weights=weights)

    def run(group: TensorGroup) -> Tensor:
        return whole_outputs(CutModel(specs, group, sequence_parallel=True, weights=weights)(TOKENS))

    with torch.no_grad():
        expected = whole_outputs(alone(TOKENS))
        torch.testing.assert_close(run_ranks(2, run)[0], expected, rtol=1e-10, atol=1e-10)
        dense = CutModel(specs_of(model, sparse_attention=None), None, sequence_parallel=False, weights=weights)
        assert not torch.allclose(whole_outputs(dense(TOKENS)), expected)


@pytest.mark.parametrize("model", MODELS)
def test_tokens_read_one_by_one_are_scored_as_those_read_at_once(model: str) -> None:
    """The second sequence has 5 tokens less, and is padded on the left."""
    specs = specs_of(model)
    layers = CutModel(specs, None, sequence_parallel=False, weights=random_weights(specs))
    for padding in ([0, 0], [0, 5]):
        rows = [row[shift:] for row, shift in zip(TOKENS, padding, strict=True)]
        cache, found = KeyValueCache(padding, "cpu"), []
        batch = torch.stack([F.pad(row, (shift, 0)) for row, shift in zip(rows, padding, strict=True)])
        with torch.no_grad():
            for tokens in (batch[:, :17], batch[:, 17:20], *batch[:, 20:].split(1, 1)):
                with cache.reading(caching_modules(layers.layers.values()), tokens.shape[1]):
                    found.append(whole_outputs(layers(tokens)))
            for row, shift, logits in zip(rows, padding, torch.cat(found, 1), strict=True):
                expected = whole_outputs(layers(row[None]))[0]
                torch.testing.assert_close(logits[shift:], expected, rtol=1e-9, atol=1e-9)


def test_costs_are_those_of_what_is_attended_to() -> None:
    tokens = torch.empty(1, 1024, dtype=torch.int64, device="meta")
    sparse = {"mode": "bigbird", "block": 16}
    flops, saved = {}, {}
    for name, settings in (("sparse", sparse), ("dense", None)):
        specs = specs_of("gpt2, bigbird", max_positions=1024, sparse_attention=settings)
        attention = describe_layers(specs, tokens, dtype=torch.float32).layers[2]
        projections = 2 * 1024 * 32 * (32 + 2 * 16 + 32)
        flops[name] = (attention.forward_flops - projections, attention.flops - 3 * projections)
        saved[name] = attention.saved_bytes
    layouts = HeadLayouts(BlockLayouts(SparseAttention(**sparse), 4, 1024), 0, 4)
    # A chunk of 128 queries takes the keys of all its blocks.
    table = layouts.tables()[0].view(8, 8, 64).any(1)
    pairs = 128 * 16 * int(table.sum())
    assert flops["sparse"][0] == 2 * 2 * pairs * 32
    assert flops["sparse"][1] == 7 * 2 * pairs * 32
    assert flops["sparse"][1] < flops["dense"][1] / 2
    assert saved["sparse"] == saved["dense"]
