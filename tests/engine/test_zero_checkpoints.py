"""Checkpoints of ZeRO-2 and 3: runs that go on under the same layout or another, with or without a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_jobs import (
    GLOBAL_BATCH,
    VOCAB,
    Case,
    build_engine,
    compiling_adam,
    micro_batches,
    reference,
    show,
    train_job,
)
from gloo_workers import GlooWorkers
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.layers.specs import LayerSpec

pytestmark = pytest.mark.distributed


def run(gloo: GlooWorkers, case: Case, **options: Any) -> list[dict[str, Any]]:
    return gloo.run(case.world_size, train_job, case, options)


def run_compiling_adam(gloo: GlooWorkers, case: Case, **options: Any) -> list[dict[str, Any]]:
    return gloo.run(case.world_size, compiling_adam, train_job, case, options)


LAYOUTS = [
    Case(zero=1, pp=2),
    Case(zero=2, dp=2, offload="nvme"),
    Case(zero=3, dp=4),
    Case(zero=3, dp=2, offload="parameters"),
    Case(zero=1, pp=2, offload="optimizer"),
]


@pytest.mark.parametrize(
    "distances",
    # In a ring every layout writes and reads. As a checkpoint knows no layout, the other pairs repeat that.
    [[1], pytest.param([2, 3, 4], marks=pytest.mark.slow)],
    ids=["the next", "all others"],
)
@pytest.mark.parametrize(
    "writer", [0, 2, *(pytest.param(writer, marks=pytest.mark.slow) for writer in (1, *range(3, len(LAYOUTS))))]
)
def test_any_layout_goes_on_from_any_other(
    gloo: GlooWorkers, tmp_path: Path, writer: int, distances: list[int]
) -> None:
    expected, run_here = reference(Case()), run if distances == [1] else run_compiling_adam
    run_here(gloo, LAYOUTS[writer], save=str(tmp_path))
    for distance in distances:
        reader = LAYOUTS[(writer + distance) % len(LAYOUTS)]
        for result in run_here(gloo, reader, load=str(tmp_path / "step-00000002")):
            assert result["losses"] == pytest.approx(expected["losses"][2:], rel=1e-4)
            assert result["norms"] == pytest.approx(expected["norms"][2:], rel=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=2, dp=2),
        Case(zero=3, dp=2),
        # DeepSpeed's Adam for CPUs multiplies its betas up as it runs, and takes their power when it goes on: these
        # agree to the last bit after ten steps, and not after five.
        pytest.param(Case(zero=3, dp=2, precision="bf16", offload="optimizer", steps=20), marks=pytest.mark.slow),
        pytest.param(Case(zero=2, dp=2, precision="fp16"), marks=pytest.mark.slow),
        pytest.param(Case(zero=3, dp=2, precision="fp16"), marks=pytest.mark.slow),
    ],
    ids=show,
)
def test_the_same_layout_goes_on_bit_for_bit(gloo: GlooWorkers, tmp_path: Path, case: Case) -> None:
    half = case.steps // 2
    run_here = run if case.offload == "none" else run_compiling_adam
    whole = run_here(gloo, case, save=str(tmp_path), save_after=half)
    resumed = run_here(gloo, case, load=str(tmp_path / f"step-{half:08d}"))
    for before, after in zip(whole, resumed, strict=True):
        assert after["losses"] == before["losses"][half:]
        assert after["norms"] == before["norms"][half:]
        for name, weights in before["weights"].items():
            assert torch.equal(weights, after["weights"][name]), name


def test_parameters_that_do_not_divide_and_frozen_ones_are_saved_whole(gloo: GlooWorkers, tmp_path: Path) -> None:
    gloo.run(2, train_odd, str(tmp_path), False)
    reader = CheckpointReader(tmp_path / "odd")
    assert {name: entry.shape for name, entry in reader.manifest.tensors.items()} == {
        "layers.0.weight": (VOCAB, 5),
        "layers.0.frozen": (7,),
    }
    assert torch.equal(reader.tensor("layers.0.frozen"), torch.arange(7.0))
    gloo.run(2, train_odd, str(tmp_path), True)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, 5))
        self.frozen = nn.Parameter(torch.arange(7.0), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = F.embedding(token_ids, self.weight)
        return x @ self.weight.t() * self.frozen.mean()


def train_odd(rank: int, folder: str, resumes: bool) -> None:
    case = Case(zero=3, dp=2)
    engine = build_engine(case, [LayerSpec(Odd)])
    if not resumes:
        engine.train_batch(micro_batches(0, case, rank))
        engine.save_checkpoint(folder, tag="odd", client_state={"epoch": 2})
        return
    before = {name: engine.view.full_frozen(p) for name, p, _ in engine.module.named_logical_parameters()}
    path, client_state = engine.load_checkpoint(folder, tag="odd")
    assert path is not None
    assert client_state == {"epoch": 2}
    assert (engine.global_steps, engine.global_samples) == (1, GLOBAL_BATCH)
    reader = CheckpointReader(Path(path))
    for name, parameter, _ in engine.module.named_logical_parameters():
        assert torch.equal(engine.view.full_frozen(parameter), reader.tensor(name))
        assert parameter.requires_grad == (not torch.equal(before[name], reader.tensor(name)))
        if parameter.requires_grad:
            for state in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(engine.view.full_state(parameter, state), reader.tensor(name, state))
