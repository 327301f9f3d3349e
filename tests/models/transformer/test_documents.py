"""Documents that share a sequence, against each document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipekit.costs.describe import describe_layers
from pipekit.layers.specs import LayerSpec
from pipekit.models import find_families
from pipekit.models.transformer import language_model_loss
from pipekit.models.transformer.documents import number_documents
from pipekit.models.transformer.flex import attend_flexibly
from pipekit.tensor_parallel import TensorGroup, whole_outputs
from tensor_parallel.outcomes import VOCAB, random_weights
from tensor_parallel.sharded_model import CutModel, assert_all_close, join_gradients
from tensor_parallel.threads import run_ranks

LENGTHS = [(3, 1, 7, 5), (9, 7)]
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
TOKENS = torch.randint(VOCAB, POSITIONS.shape, generator=torch.Generator().manual_seed(0))

LONG = {"type": "longrope", "short_factor": (1.0, 1.5), "long_factor": (2.0, 3.0), "factor": 2.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in find_families()},
    "neox, in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "window, in blocks": ("mistral", {"num_kv_heads": 2, "sliding_window": 3}),
    "window, at once": ("mistral", {"sliding_window": 11}),
    "soft caps": ("gemma2", {"sliding_window": 4, "attention_soft_cap": 2.0, "final_soft_cap": 1.0}),
    "scaled by length": (
        "phi3",
        {"rotary_pct": 0.5, "rotary_scaling": {**LONG, "original_max_positions": 6}},
    ),
}


def specs_of(kind: str) -> list[LayerSpec]:
    family, settings = KINDS[kind]
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 16, "vocab_size": VOCAB}
    return find_families()[family](**{**sizes, **settings}).layer_specs()


def documents() -> list[tuple[int, slice]]:
    """Row and tokens of each document."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        found += [(row, slice(end - length, end)) for length, end in zip(lengths, ends, strict=True)]
    return found


def assert_is_its_documents(logits: Tensor, specs: list[LayerSpec], weights: dict[str, Tensor]) -> None:
    model = CutModel(specs, None, sequence_parallel=False, weights=weights)
    for row, tokens in documents():
        alone = whole_outputs(model(TOKENS[row : row + 1, tokens]))[0]
        torch.testing.assert_close(logits[row, tokens], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_packed_documents_are_those_of_each_alone(kind: str) -> None:
    specs = specs_of(kind)
    weights = random_weights(specs)
    model = CutModel(specs, None, sequence_parallel=False, weights=weights)
    with torch.no_grad():
        assert_is_its_documents(whole_outputs(model((TOKENS, POSITIONS))), specs, weights)
        assert not torch.allclose(whole_outputs(model(TOKENS)), whole_outputs(model((TOKENS, POSITIONS))))


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "window, in blocks", "soft caps"])
def test_tensor_parallel_ranks_keep_documents_apart_too(kind: str, sequence_parallel: bool) -> None:
    specs = specs_of(kind)
    weights = random_weights(specs)

    def run(group: TensorGroup) -> Tensor:
        model = CutModel(specs, group, sequence_parallel=sequence_parallel, weights=weights)
        return whole_outputs(model((TOKENS, POSITIONS)))

    with torch.no_grad():
        assert_is_its_documents(run_ranks(2, run)[0], specs, weights)


def test_gradients_are_the_sums_over_documents_alone() -> None:
    specs = specs_of("gpt2")
    weights = random_weights(specs)
    labels = torch.randint(VOCAB, TOKENS.shape, generator=torch.Generator().manual_seed(1))
    packed, alone = (CutModel(specs, None, sequence_parallel=False, weights=weights) for _ in range(2))
    language_model_loss(packed((TOKENS, POSITIONS)), labels).backward()  # type: ignore[no-untyped-call]
    for row, tokens in documents():
        loss = language_model_loss(alone(TOKENS[row : row + 1, tokens]), labels[row : row + 1, tokens])
        (loss * (tokens.stop - tokens.start) / TOKENS.numel()).backward()  # type: ignore[no-untyped-call]
    assert_all_close(join_gradients([packed.parameters()]), join_gradients([alone.parameters()]), tolerance=2e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("window", "soft_cap", "num_kv_heads"), [(3, 2.0, 2), pytest.param(16, None, 4, marks=pytest.mark.slow)]
)
def test_flex_attention_attends_as_the_mask_does(window: int, soft_cap: float | None, num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, 16, 8, generator=generator)
    k, v = torch.randn(2, 2, num_kv_heads, 16, 8, generator=generator)
    numbers = number_documents(POSITIONS)
    found = attend_flexibly(q, k, v, documents=numbers, window=window, scale=0.3, soft_cap=soft_cap, compiles=False)
    for batch, head, query in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(16)).tolist():
        seen = [
            key for key in range(max(0, query - window + 1), query + 1) if numbers[batch, key] == numbers[batch, query]
        ]
        shared = head * num_kv_heads // 4
        scores = 0.3 * k[batch, shared, seen] @ q[batch, head, query]
        scores = scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
        torch.testing.assert_close(found[batch, head, query], scores.softmax(0) @ v[batch, shared, seen])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gpt2", "llama", "window, in blocks", "soft caps"])
def test_compiled_flex_attention_keeps_documents_apart_on_a_gpu(kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    specs = specs_of(kind)
    weights = random_weights(specs)
    model = CutModel(specs, None, sequence_parallel=False, weights=weights, dtype=torch.float32)
    expected = whole_outputs(model((TOKENS, POSITIONS)))
    for layer in model.layers.values():
        layer.cuda()
    found = whole_outputs(model((TOKENS.cuda(), POSITIONS.cuda())))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_costs_are_described_with_positions_beside_the_tokens() -> None:
    tokens = torch.empty(2, 16, dtype=torch.int64, device="meta")
    plain, packed = (
        describe_layers(specs_of("gpt2"), inputs, dtype=torch.bfloat16, loss_fn=language_model_loss, labels=tokens)
        for inputs in (tokens, (tokens, tokens))
    )
    for ours, theirs in zip(packed.layers[1:-1], plain.layers[1:-1], strict=True):
        assert (ours.forward_flops, ours.parameters) == (theirs.forward_flops, theirs.parameters)
        assert ours.output_bytes == theirs.output_bytes + 2 * 16 * 8
