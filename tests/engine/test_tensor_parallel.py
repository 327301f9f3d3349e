"""Tensor parallelism against one process that uses nothing but torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_jobs import (
    SEQUENCE,
    VOCAB,
    Case,
    assert_trained_as_one_process,
    batch,
    build_engine,
    micro_batches,
    model_specs,
    reference,
    reference_run,
    show,
    train_job,
)
from gloo_workers import GlooWorkers
from pipekit.errors import ConfigError, DataError
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec
from pipekit.models import find_families
from pipekit.models.transformer import language_model_loss
from pipekit.tensor_parallel import ColumnParallelLinear, RowParallelLinear

pytestmark = pytest.mark.distributed


def check_against_reference(gloo: GlooWorkers, case: Case) -> None:
    assert_trained_as_one_process(gloo.run(case.world_size, train_job, case, {}), case)


WHOLE_3D = Case(pp=2, dp=2, tp=2, zero=1)
UNTIED_AND_GROUPED = replace(WHOLE_3D, tied=False, num_kv_heads=2, schedule="zb-v")


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_3d_with_sequence_parallelism_trains_as_one_process_does(gloo: GlooWorkers, tied: bool) -> None:
    check_against_reference(gloo, replace(WHOLE_3D, tied=tied))


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2),
        pytest.param(Case(tp=2, zero=0, sequence_parallel=False), marks=pytest.mark.slow),
        pytest.param(Case(tp=4, tied=False), marks=pytest.mark.slow),
        Case(tp=2, sequence_parallel=False, tied=False, loss_chunk_tokens=5),
        pytest.param(Case(tp=2, loss_chunk_tokens=5), marks=pytest.mark.slow),
        Case(tp=2, pp=2, schedule="zb-v"),
        Case(tp=2, pp=2, schedule="zb-h1", sequence_parallel=False),
        pytest.param(Case(tp=2, checkpointing=True), marks=pytest.mark.slow),
        Case(tp=2, num_kv_heads=2),
        pytest.param(Case(tp=2, num_kv_heads=1), marks=pytest.mark.slow),
        pytest.param(Case(tp=4, num_kv_heads=2, sequence_parallel=False), marks=pytest.mark.slow),
        Case(tp=2, pp=2, family="gpt_neox", tied=False),
        pytest.param(Case(tp=2, pp=2, family="llama", tied=False, num_kv_heads=2), marks=pytest.mark.slow),
        pytest.param(Case(tp=2, pp=2, family="qwen3", num_kv_heads=2), marks=pytest.mark.slow),
        pytest.param(Case(tp=2, pp=2, family="gemma2", num_kv_heads=1, loss_chunk_tokens=5), marks=pytest.mark.slow),
        pytest.param(Case(tp=2, pp=2, family="olmo2", num_kv_heads=1, schedule="zb-v"), marks=pytest.mark.slow),
    ],
    ids=show,
)
def test_tensor_parallel_ranks_train_as_one_process_does(gloo: GlooWorkers, case: Case) -> None:
    check_against_reference(gloo, case if case.pp > 1 else replace(case, micro_batch_size=2))


@pytest.mark.slow
@pytest.mark.parametrize("family", find_families())
@pytest.mark.parametrize("case", [WHOLE_3D, UNTIED_AND_GROUPED], ids=["tied, 1f1b", "untied, grouped, zb-v"])
def test_every_family_trains_in_3d_as_in_one_process(gloo: GlooWorkers, family: str, case: Case) -> None:
    if "num_kv_heads" not in find_families()[family].model_fields:
        case = replace(case, num_kv_heads=None)
    check_against_reference(gloo, replace(case, family=family, steps=20))


@pytest.mark.parametrize(
    "changes",
    [
        [{"pp": 2, "checkpointing": True}],
        pytest.param(
            [{"pp": 2}, {"dp": 2, "zero": 0}, {"pp": 2, "dp": 2, "checkpointing": True}, {"pp": 2, "schedule": "zb-v"}],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["checkpointing", "others"],
)
def test_dropout_draws_the_same_masks_under_every_layout_of_one_degree(
    gloo: GlooWorkers, changes: list[dict[str, Any]]
) -> None:
    alone = Case(tp=2, dropout=0.2, steps=2)
    first = gloo.run(2, train_job, alone, {})[0]
    assert first["losses"] != pytest.approx(reference(Case())["losses"][:2], rel=1e-3)
    for change in changes:
        case = replace(alone, **change)
        found = gloo.run(case.world_size, train_job, case, {})[0]
        assert found["losses"] == pytest.approx(first["losses"], rel=1e-4), case
        assert found["norms"] == pytest.approx(first["norms"], rel=1e-4), case


def dropout_masks(rank: int, sequence_parallel: bool) -> dict[str, list[Tensor]]:
    """Outputs of each layer with dropout for inputs of ones, on this tensor-parallel rank."""
    case = Case(tp=2, dropout=0.5, steps=1, sequence_parallel=sequence_parallel)
    engine = build_engine(case)
    masks: dict[str, list[Tensor]] = {}
    for layer_idx, (spec, name) in enumerate(zip(engine.module.layer_specs, engine.module.layer_names, strict=True)):
        if spec.type_name == "MLPHalf":
            half = engine.module.get_submodule(str(layer_idx))
            half.contract.forward = lambda x, group=half.group: torch.ones(1, SEQUENCE // (1 + sequence_parallel), 32)
            half.register_forward_hook(
                lambda module, args, out, name=name: masks.setdefault(name, []).append((out - args[0]).detach() != 0)
            )
    for parameter in engine.module.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        engine.module.train()
        for micro_batch in range(2):
            engine.module.forward_stage(0, batch(0)[0][:1], dropout_path=(0, micro_batch))
    return masks


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_dropout_on_parts_differs_by_rank_and_on_whole_activations_does_not(
    gloo: GlooWorkers, sequence_parallel: bool
) -> None:
    ours, theirs = gloo.run(2, dropout_masks, sequence_parallel)
    assert len(ours) == 3
    seen = []
    for name, masks in ours.items():
        for mask, peers in zip(masks, theirs[name], strict=True):
            assert 0.3 < mask.float().mean() < 0.7
            assert torch.equal(mask, peers) != sequence_parallel
            seen.append(mask)
    assert not any(torch.equal(mask, other) for i, mask in enumerate(seen) for other in seen[:i])


def other_data(rank: int) -> str:
    engine = build_engine(Case(tp=2, pp=2, steps=1))
    try:
        engine.train_batch(micro_batches(engine.mpu.coordinate.tensor, Case(), 0))
    except DataError as error:
        return str(error)
    return "no error"


def no_data(rank: int) -> str:
    engine = build_engine(Case(tp=2, pp=2, steps=1))
    try:
        engine.train_batch(iter([]) if rank == 1 else micro_batches(0, Case(), 0))
    except DataError as error:
        return str(error)
    return "no error"


def test_tensor_parallel_ranks_that_read_other_data_stop_all(gloo: GlooWorkers) -> None:
    for message in gloo.run(4, other_data):
        assert "tensor-parallel ranks of the" in message
    for message in gloo.run(4, no_data):
        assert "ended at micro-batch 0 of 8" in message


SAVED = Case(pp=2, tp=2)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (Case(tp=4), Case(pp=2, dp=2), Case(dp=2, tp=2, sequence_parallel=False))
        ),
    ],
    ids=show,
)
def test_a_checkpoint_of_one_degree_goes_on_under_another(gloo: GlooWorkers, case: Case, tmp_path: Path) -> None:
    saved = gloo.run(4, train_job, SAVED, {"save": str(tmp_path)})[0]
    found = gloo.run(case.world_size, train_job, case, {"load": str(tmp_path / "step-00000002")})[0]
    assert found["losses"] == pytest.approx(saved["losses"][2:], rel=1e-4)
    assert found["norms"] == pytest.approx(saved["norms"][2:], rel=1e-4)
    # And back.
    gloo.run(case.world_size, train_job, replace(case, steps=2), {"save": str(tmp_path / "back")})
    back = gloo.run(4, train_job, SAVED, {"load": str(tmp_path / "back" / "step-00000002")})[0]
    assert back["losses"] == pytest.approx(saved["losses"][2:], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_16_bits_stay_near_fp32(gloo: GlooWorkers, precision: str) -> None:
    expected = reference(Case())
    case = Case(tp=2, pp=2, precision=precision)
    alone = gloo.run(1, train_job, Case(precision=precision, steps=1), {})[0]
    for result in gloo.run(4, train_job, case, {}):
        assert result["norms"][0] == pytest.approx(alone["norms"][0], rel=5e-3)
        assert result["losses"] == pytest.approx(expected["losses"], rel=0.02)
        assert result["norms"] == pytest.approx(expected["norms"], rel=0.05)


@pytest.mark.slow
def test_zero_2_beside_it(gloo: GlooWorkers) -> None:
    check_against_reference(gloo, Case(tp=2, dp=2, zero=2))
    check_against_reference(gloo, Case(tp=2, zero=2, tied=False, sequence_parallel=False, loss_chunk_tokens=5))


def mixer_under_zero_3(rank: int) -> dict[str, Any]:
    """Train layers whose last returns a tensor."""
    case = Case(tp=2, dp=2, zero=3)
    engine = build_engine(case, mixer_specs())
    losses, norms = [], []
    for step in range(case.steps):
        losses.append(float(engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank))))
        norms.append(engine.grad_norm)
    return {"losses": losses, "norms": norms}


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.expand = ColumnParallelLinear(32, 64)
        self.contract = RowParallelLinear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.gelu(self.expand(self.norm(x))))


def mixer_specs() -> list[LayerSpec]:
    return [LayerSpec(nn.Embedding, VOCAB, 32), LayerSpec(Mixer), LayerSpec(Mixer), LayerSpec(nn.Linear, 32, VOCAB)]


def test_zero_3_beside_layers_of_ones_own(gloo: GlooWorkers) -> None:
    expected = reference_run(Case(), mixer_specs())
    for result in gloo.run(4, mixer_under_zero_3):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def logits_under_zero_3(rank: int) -> str:
    case = Case(dp=2, zero=3, loss_chunk_tokens=5)
    engine = build_engine(case)
    try:
        engine.train_batch(micro_batches(0, case, rank))
    except ConfigError as error:
        return str(error)
    return "no error"


def test_zero_3_refuses_a_loss_that_needs_weights_which_it_has_let_go(gloo: GlooWorkers) -> None:
    for message in gloo.run(2, logits_under_zero_3):
        assert "try ZeRO-2" in message


def evaluate(rank: int, case: Case) -> tuple[float, Tensor | None]:
    engine = build_engine(case)
    seen: list[Tensor] = []
    data = micro_batches(0, case, engine.mpu.data_parallel_rank)
    loss, logits = engine.eval_batch(data, return_logits=True, observe=lambda outputs, labels: seen.append(outputs))
    assert (logits is None) == (not engine.mpu.is_last_stage)
    if logits is not None:
        assert torch.equal(torch.cat(seen), logits)
    return float(loss), logits


@pytest.mark.parametrize(
    "case", [Case(tp=2, pp=2), Case(tp=2, sequence_parallel=False, tied=False, loss_chunk_tokens=5)], ids=show
)
def test_an_evaluation_gives_whole_logits(gloo: GlooWorkers, case: Case) -> None:
    inputs, labels = batch(0)
    with torch.no_grad():
        expected = SequentialModel(model_specs(case), seed=1)(inputs)
    for loss, logits in gloo.run(case.world_size, evaluate, case):
        assert loss == pytest.approx(F.cross_entropy(expected.flatten(0, 1), labels.flatten()).item(), rel=1e-5)
        if logits is not None:
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def train_deepspeed_script(rank: int) -> list[float]:
    """Train as a script of DeepSpeed does, whose topology has a tensor-parallel axis."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    import pipekit

    module = pipekit.PipelineModule(
        mixer_specs(),
        topology=PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1),
        loss_fn=language_model_loss,
        base_seed=1,
        device="cpu",
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    engine, *_ = pipekit.initialize(model=module, optimizer=optimizer, config=config)
    return [float(engine.train_batch(micro_batches(step, Case(), 0))) for step in range(5)]


def test_a_script_of_deepspeed_with_a_tensor_parallel_topology(gloo: GlooWorkers) -> None:
    model = SequentialModel(mixer_specs(), seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    expected = []
    for step in range(5):
        inputs, labels = batch(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert expected[-1] < 0.9 * expected[0]
    for losses in gloo.run(4, train_deepspeed_script):
        assert losses == pytest.approx(expected, rel=1e-5)
