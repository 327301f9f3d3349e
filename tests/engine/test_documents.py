"""Documents that share a sequence, and labels left out of the loss, under several layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_jobs import GLOBAL_BATCH, SEQUENCE, VOCAB, Case, batch, build_engine, make_optimizer, model_specs, show
from gloo_workers import GlooWorkers
from pipekit.layers.sequential import SequentialModel

pytestmark = pytest.mark.distributed

LENGTHS = [(5, 1, 10), (16,), (2, 7, 7), (12, 4)]


def packed() -> tuple[Tensor, Tensor]:
    """Token ids and positions."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    return torch.randint(VOCAB, positions.shape, generator=torch.Generator().manual_seed(3)), positions


def logits_job(rank: int, case: Case) -> Tensor | None:
    engine = build_engine(case)
    tokens, positions = packed()
    size = case.micro_batch_size
    batches = [
        ((tokens[start : start + size], positions[start : start + size]), tokens[start : start + size])
        for start in range(0, len(tokens), size)
    ]
    _, logits = engine.eval_batch(iter(batches), return_logits=True, num_micro_batches=len(batches))
    return None if logits is None else logits


CASE = Case(pp=2, tp=2, micro_batch_size=2)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        replace(CASE, family="llama", num_kv_heads=2, tied=False),
        pytest.param(replace(CASE, family="gpt_neox", sequence_parallel=False), marks=pytest.mark.slow),
        pytest.param(replace(CASE, family="gemma2", num_kv_heads=2), marks=pytest.mark.slow),
        pytest.param(replace(CASE, pp=4, tp=1), marks=pytest.mark.slow),
    ],
    ids=lambda case: f"{case.family}, pp={case.pp}, tp={case.tp}",
)
def test_logits_of_packed_documents_are_those_of_each_alone(gloo: GlooWorkers, case: Case) -> None:
    results = [logits for logits in gloo.run(case.world_size, logits_job, case) if logits is not None]
    tokens, _ = packed()
    model = SequentialModel(model_specs(case), seed=1).eval()
    assert results
    for logits in results:
        assert logits.shape == (len(LENGTHS), SEQUENCE, VOCAB)
        for row, lengths in enumerate(LENGTHS):
            for start, part in zip(torch.tensor([0, *lengths]).cumsum(0), logits[row].split(lengths), strict=False):
                with torch.no_grad():
                    alone: Any = model(tokens[row : row + 1, start : start + len(part)])
                torch.testing.assert_close(part, alone[0], rtol=1e-5, atol=1e-5)


MASKED = [0.0, 0.9, 0.3, 1.0, 0.5, 0.0, 1.0, 0.7]
"""Share of each sample's labels that are left out of the loss."""


def masked_batch(step: int) -> tuple[Tensor, Tensor]:
    inputs, labels = batch(step)
    shares = torch.tensor(MASKED).unsqueeze(1)
    is_out = torch.rand(labels.shape, generator=torch.Generator().manual_seed(step)) < shares
    return inputs, labels.masked_fill(is_out, -100)


def count_labels(labels: Tensor) -> Tensor:
    return (labels != -100).sum()


def masked_training_job(rank: int, case: Case) -> dict[str, list[float]]:
    engine = build_engine(case, loss_weight=count_labels)
    share = GLOBAL_BATCH // case.dp
    losses, norms, evaluations = [], [], []
    for step in range(case.steps):
        tensors = [part[engine.mpu.data_parallel_rank * share :][:share] for part in masked_batch(step)]
        batches = list(zip(*(part.split(case.micro_batch_size) for part in tensors), strict=True))
        evaluations.append(float(engine.eval_batch(iter(batches))))
        losses.append(float(engine.train_batch(iter(batches))))
        norms.append(engine.grad_norm)
    return {"losses": losses, "norms": norms, "evaluations": evaluations}


def masked_reference(case: Case) -> dict[str, list[float]]:
    """Losses and norms of one process with plain torch, each the mean over all labels of the whole batch."""
    model = SequentialModel(model_specs(replace(case, loss_chunk_tokens=None)), seed=1)
    optimizer = make_optimizer(case, list(model.parameters()))
    losses, norms = [], []
    for step in range(case.steps):
        inputs, labels = masked_batch(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), case.clip)))
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "evaluations": losses}


MASKED_CASE = Case(pp=2, dp=2, micro_batch_size=1, steps=3)


@pytest.mark.parametrize(
    "case",
    [
        MASKED_CASE,
        replace(MASKED_CASE, pp=1, zero=2, micro_batch_size=2),
        pytest.param(replace(MASKED_CASE, pp=1, tp=2, loss_chunk_tokens=5), marks=pytest.mark.slow),
        pytest.param(replace(MASKED_CASE, schedule="zb-v", micro_batch_size=2), marks=pytest.mark.slow),
        pytest.param(replace(MASKED_CASE, pp=1, zero=3), marks=pytest.mark.slow),
        pytest.param(replace(MASKED_CASE, pp=1, dp=1), marks=pytest.mark.slow),
    ],
    ids=show,
)
def test_the_loss_is_the_mean_over_all_labels_of_the_global_batch(gloo: GlooWorkers, case: Case) -> None:
    # Some micro-batches have no label at all, and none has as many as another.
    expected = masked_reference(case)
    for result in gloo.run(case.world_size, masked_training_job, case):
        for kind, numbers in expected.items():
            assert result[kind] == pytest.approx(numbers, rel=2e-5), kind
