"""Tasks during a training: the live model answers as one process does, under every layout, and training goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from engine_jobs import SEQUENCE, VOCAB, Case, build_engine, micro_batches, model_specs, reference, show
from fork_server import run_pipekit
from gloo_workers import GlooWorkers
from hand_made import small_tokenizer
from pipekit.evaluation.scoring import Span, score_spans, token_scores
from pipekit.inference.sample_tokens import sample_tokens
from pipekit.layers.sequential import SequentialModel

CASES = [
    Case(pp=2),
    pytest.param(Case(pp=2, tp=2), marks=pytest.mark.slow),
    pytest.param(Case(dp=2, zero=3, micro_batch_size=2), marks=pytest.mark.slow),
    pytest.param(Case(dp=2, pp=2, schedule="zb-v", micro_batch_size=2), marks=pytest.mark.slow),
]


def spans() -> list[Span]:
    generator = torch.Generator().manual_seed(3)
    lengths = [2, 7, SEQUENCE + 1, 5, 3, 3, 11]
    tokens = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    tokens[5] = [*tokens[4][:-1], 8]
    return [Span(tuple(each), 1 + index % (len(each) - 1)) for index, each in enumerate(tokens)]


PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]]


def ask(rank: int, case: Case, tokenizer_file: str) -> dict[str, Any]:
    from pipekit.evaluation.models import AskedModel, ask_together
    from pipekit.training.shipped.lm_eval import LiveModel

    engine = build_engine(case)
    live = LiveModel(engine, longest_sequence=SEQUENCE, tokenizer_file=Path(tokenizer_file))

    def evaluate(model: AskedModel) -> dict[str, Any]:
        scores = score_spans(spans(), model.score, batch_size=5)
        texts = model.generate(
            PROMPTS, max_new_tokens=4, temperature=0.0, top_k=None, top_p=None, stop=["never"], seed=0
        )
        return {"scores": [(each.log_likelihood, each.is_greedy) for each in scores], "texts": texts}

    found = ask_together(live, evaluate, leads=rank == 0) or {}
    loss = engine.train_batch(micro_batches(0, case, engine.mpu.data_parallel_rank))
    return {**found, "loss": float(loss)}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=show)
def test_the_live_model_answers_as_one_process_does(case: Case, gloo: GlooWorkers, tmp_path: Path) -> None:
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    results = gloo.run(case.world_size, ask, case, str(tmp_path / "tokenizer.json"))
    model = SequentialModel(model_specs(case), seed=1).eval()

    @torch.no_grad()
    def score(inputs: Tensor, lengths: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_scores(model(inputs), targets)

    expected = score_spans(spans(), score, batch_size=1)
    for (log_likelihood, is_greedy), theirs in zip(results[0]["scores"], expected, strict=True):
        assert log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-4)
        assert is_greedy is theirs.is_greedy
    texts = [
        list(sample_tokens(model, each, max_new_tokens=4, max_positions=SEQUENCE, temperature=0.0, end_token_id=0))
        for each in PROMPTS
    ]
    assert results[0]["texts"] == texts
    for result in results:
        assert result["loss"] == pytest.approx(reference(case)["losses"][0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_pipeline_runs_tasks_at_their_steps_as_pipekit_eval_does_on_its_checkpoint(tmp_path: Path) -> None:
    lines = [{"text": f"def f_{number}(argument):\n    return argument\n"} for number in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"data_files": {"test": str(tmp_path / "text.jsonl")}, "cache_dir": str(tmp_path / "hf")}
    task = {
        "task": "read",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/read.yaml").write_text(yaml.safe_dump(task))
    config = {
        "model": {"preset": "tiny"},
        "train": {"steps": 5, "eval_interval": 2, "eval_batches": 1, "global_batch_size": 4, "sequence_length": 16},
        "parallel": {"pp": 2},
        "data": {"source": str(tmp_path / "text.jsonl"), "vocab_size": 300, "cache_dir": str(tmp_path / "cache")},
        "callbacks": {"lm_eval": {"tasks": ["read"], "include_path": str(tmp_path / "tasks"), "limit": 9, "every": 4}},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = run_pipekit(["train", "c.yaml", "run.device=cpu"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/c"
    records = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(record["step"], record["questions"]) for record in records] == [(step, {"read": 9}) for step in (0, 4, 5)]
    values = [record["tasks"]["read"]["bits_per_byte"] for record in records]
    assert values[0] > values[1] > values[2]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {each["step"]: each["val_read_bits_per_byte"] for each in metrics if "val_read_bits_per_byte" in each}
    assert told == pytest.approx(dict(zip((0, 4, 5), values, strict=True)))
    arguments = ["eval", "runs/c", "--tasks", "read", "--include-path", "tasks", "--limit", "9", "--json"]
    done = run_pipekit([*arguments, "--device", "cpu"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"]["read"]["bits_per_byte"] == pytest.approx(values[-1], rel=1e-5)


def test_tasks_are_run_at_evaluations() -> None:
    from pipekit.config import parse_config
    from pipekit.errors import ConfigError

    values = {"model": {"preset": "tiny"}, "callbacks": {"lm_eval": {"tasks": ["x"], "every": 150}}}
    with pytest.raises(ConfigError, match=r"train\.eval_interval=null makes none; try train\.eval_interval=150"):
        parse_config({**values, "train": {"steps": 9}})
    with pytest.raises(ConfigError, match=r"no multiple of train\.eval_interval=100, .* try .*every=200"):
        parse_config({**values, "train": {"steps": 9, "eval_interval": 100}})
