"""Models that several ranks have trained, in the hands of `transformers`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine_jobs import SEQUENCE, VOCAB, Case, model_of, model_specs, reference_run, show, train_job
from gloo_workers import GlooWorkers
from pipekit.inference.export import export_checkpoint
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.layers.sequential import SequentialModel
from pipekit.models import find_families

LAYOUT = Case(pp=2, tp=2, steps=3)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        replace(LAYOUT, family="llama", num_kv_heads=2, tied=False),
        Case(dp=2, zero=3, steps=3, family="llama", num_kv_heads=2),
        *(
            pytest.param(replace(LAYOUT, family=family, tied=tied), marks=pytest.mark.slow)
            for family in find_families()
            for tied in (True, False)
        ),
    ],
    ids=show,
)
def test_what_ranks_have_trained_is_exported(gloo: GlooWorkers, tmp_path: Path, case: Case) -> None:
    results = gloo.run(case.world_size, train_job, case, {"save": str(tmp_path / "checkpoints"), "save_after": 3})
    check = export_checkpoint(tmp_path, tmp_path / "out")
    assert check.step == 3
    exported = HuggingFaceFolder(tmp_path / "out", model_of(case))
    held = {name: tensor for result in results for name, tensor in result["weights"].items()}
    assert held.keys() == exported.shapes.keys()
    for name, tensor in held.items():
        assert torch.equal(exported.tensor(name), tensor), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    alone = SequentialModel(model_specs(case), seed=None).eval()
    alone.load_logical_tensors(reference_run(case)["weights"], where="one process")
    tokens = torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected, actual = alone(tokens), theirs(tokens).logits
    assert float((actual - expected).norm() / expected.norm()) < 1e-4
