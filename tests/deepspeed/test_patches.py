"""Engines of DeepSpeed's own, beside ours in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from engine_jobs import Case, build_engine, micro_batches
from gloo_workers import GlooWorkers

pytestmark = pytest.mark.distributed


def train_deepspeeds_pipeline(rank: int, beside_ours: bool) -> list[float]:
    from deepspeed.pipe import LayerSpec, PipelineModule

    import deepspeed
    from pipekit.deepspeed.patches import use_joined_processes

    use_joined_processes()
    torch.manual_seed(0)
    module = PipelineModule(
        [LayerSpec(nn.Linear, 4, 4) for _ in range(2)], num_stages=2, loss_fn=nn.functional.mse_loss
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
    )

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        while True:
            yield torch.randn(2, 4, generator=generator), torch.ones(2, 4)

    losses = [float(engine.train_batch(data()))]
    if beside_ours:
        case = Case(pp=2, steps=1)
        ours = build_engine(case)
        ours.train_batch(micro_batches(0, case, 0))
    losses.append(float(engine.train_batch(data())))
    if beside_ours:
        ours.destroy()
    return [*losses, float(engine.train_batch(data()))]


def test_a_pipeline_of_deepspeeds_goes_on_beside_an_engine_of_ours(gloo: GlooWorkers) -> None:
    alone = gloo.run(2, train_deepspeeds_pipeline, False)
    assert alone[0][2] < alone[0][0]
    assert gloo.run(2, train_deepspeeds_pipeline, True) == alone
