"""Profiles of two stages: sums of time, one clock, memory and traces, and operations by published formulas."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

from engine_jobs import SEQUENCE, VOCAB, Case, build_engine, micro_batches, model_of
from gloo_workers import GlooWorkers
from pipekit.config.profile_config import ProfileConfig

pytestmark = pytest.mark.distributed

SKEW_S = 5.0
START, STEPS = 2, 3


def profile_job(rank: int, case: Case, folder: str, skew_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Train through a window, with the clock of each rank ahead of the one before; return times by another clock."""
    from pipekit.step_profile.window import ProfileWindow

    true_clock = time.perf_counter
    time.perf_counter = lambda: true_clock() + rank * skew_s
    engine = build_engine(case)
    settings = ProfileConfig(start=START, steps=STEPS, **options)
    window = ProfileWindow(engine, settings, folder=Path(folder), reports=rank == 0, matmul_format="fp32")
    assert engine.mpu.activity.observer is None
    took_s, texts = [], []
    for step in range(1, START + STEPS + 2):
        data = micro_batches(step, case, engine.mpu.data_parallel_rank)
        with window.measuring(step):
            started_s = time.monotonic()
            engine.train_batch(data)
            took_s.append(time.monotonic() - started_s)
        assert engine.mpu.activity.observer is None
        texts.append(window.take_text())
    # As in a run that goes on after step 3, within the window, and once more from there.
    resumed = Path(folder) / "resumed"
    window = ProfileWindow(engine, settings, folder=resumed, reports=rank == 1, matmul_format="fp32")
    for step in (4, 4, 5):
        with window.measuring(step):
            engine.train_batch(micro_batches(step, case, 0))
    texts.append(window.take_text())
    time.perf_counter = true_clock
    return {"took_s": took_s[START : START + STEPS], "texts": texts}


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def profiled(gloo: GlooWorkers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("profile")
    case, options = Case(pp=2, micro_batch_size=2), {"trace": True, "memory": True}
    return folder, gloo.run(2, profile_job, case, str(folder), SKEW_S, options)


def test_the_kinds_of_actions_add_up_to_the_step(profiled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = profiled
    with (folder / "actions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for rank, result in enumerate(results):
        own = [row for row in rows if row["rank"] == str(rank)]
        assert {row["step"] for row in own} == {"3", "4", "5"}
        assert "other" not in {row["kind"] for row in own}
        ratios = []
        for step, took_s in zip("345", result["took_s"], strict=True):
            bounds = [(float(row["start_s"]), float(row["end_s"])) for row in own if row["step"] == step]
            assert [end_s for _, end_s in bounds[:-1]] == [start_s for start_s, _ in bounds[1:]], "no gap"
            ratios.append(sum(end_s - start_s for start_s, end_s in bounds) / took_s)
        # All that is in the step, and what a busy machine puts around it in every step, but one.
        assert 1 - 1e-6 < min(ratios) < 1.02
        summary = read(folder, "actions.json")["ranks"][rank]
        assert sum(summary["seconds"].values()) == pytest.approx(summary["step_s"], rel=1e-6)
        assert summary["seconds"].keys() >= {
            "begin",
            "data",
            "receive",
            "forward",
            "backward",
            "send",
            "reduce",
            "update",
        }
        operations = [row["operation"] for row in own if row["step"] == "3" and row["kind"] == "forward"]
        assert operations == [f"run {rank}F{micro_batch}" for micro_batch in range(4)]


def test_the_table_is_told_once_with_a_row_for_each_rank(profiled: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = profiled
    assert [bool(text) for text in first["texts"]] == [False] * 4 + [True, False, False]
    assert not any(second["texts"][:-1])
    title, heading, *rows = first["texts"][4].splitlines()
    assert title.startswith("steps 3 to 5, mean milliseconds of a step by rank")
    assert heading.split()[:4] == ["rank", "begin", "data", "receive"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert all(row.endswith("FLOP/s") for row in rows)


def test_a_run_that_goes_on_within_the_window_times_the_rest(profiled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (_, second) = profiled
    assert second["texts"][-1].startswith("steps 4 to 5, mean")
    assert "FLOP/s" not in second["texts"][-1]
    assert read(folder, "resumed/actions.json")["steps"] == [4, 5]
    assert not (folder / "resumed" / "flops.json").exists()


def test_no_receive_ends_before_its_send_begins(profiled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = profiled
    clocks = read(folder, "actions.json")["ranks"]
    assert clocks[0]["clock_offset_s"] == 0
    assert clocks[1]["clock_offset_s"] == pytest.approx(SKEW_S, abs=clocks[1]["clock_error_s"] + 1e-6)
    with (folder / "actions.csv").open() as file:
        rows = list(csv.DictReader(file))
    sent = {(row["step"], row["operation"].split()[1]): row for row in rows if row["operation"].startswith("send")}
    received = [row for row in rows if row["operation"].startswith("receive")]
    assert len(received) == len(sent) == 2 * 4 * STEPS
    for row in received:
        send = sent[row["step"], row["operation"].split()[1]]
        assert send["rank"] != row["rank"]
        assert float(row["end_s"]) >= float(send["start_s"]) - clocks[1]["clock_error_s"]


def test_planned_lanes_lie_beside_measured_ones(profiled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = profiled
    events = read(folder, "timeline.json")["traceEvents"]
    lanes = {(each["pid"], each["tid"]): each["args"]["name"] for each in events if each["name"] == "thread_name"}
    assert lanes == {(rank, lane): name for rank in (0, 1) for lane, name in enumerate(["measured", "planned"])}
    spans = [each for each in events if each["ph"] == "X"]
    assert min(each["ts"] for each in spans) == 0
    for rank in (0, 1):
        measured, planned = (
            sorted(
                each["name"] for each in spans if (each["pid"], each["tid"]) == (rank, lane) and "run" in each["name"]
            )
            for lane in (0, 1)
        )
        assert measured == planned
        assert len(planned) == 2 * 4 * STEPS
    memory = [each for each in events if each["ph"] == "C"]
    assert {each["pid"] for each in memory} == {0, 1}
    assert read(folder, "step-00000005.json").keys() == {"simulated", "measured"}


def test_each_rank_has_a_trace_with_its_actions_and_its_memory(profiled: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = profiled
    for rank in (0, 1):
        names = [each.get("name") for each in read(folder, f"trace-rank-{rank}.json")["traceEvents"]]
        assert names.count(f"run {rank}F3 (stage {rank}, micro-batch 3)") >= STEPS
        assert "aten::addmm" in names
        samples = read(folder, f"memory-rank-{rank}.json")["seconds_and_bytes"]
        seconds, num_bytes = zip(*samples, strict=True)
        assert list(seconds) == sorted(seconds)
        assert min(num_bytes) > 50e6


def published_flops(case: Case) -> float:
    """Operations of a step's forward: 2 for each weight of a matrix and token, and attention over all pairs.

    Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    appendix: 24 B s l h^2 + 4 B s^2 l h, and 2 B s h V of the head. A Llama's feed-forward has three matrices.
    """
    model: Any = model_of(case)
    tokens, hidden, layers = 8 * SEQUENCE, model.hidden_size, model.num_layers
    if case.family == "gpt2":
        block = 24 * hidden**2
    else:
        kv_size = hidden // model.num_heads * model.num_kv_heads
        block = 2 * (2 * hidden**2 + 2 * hidden * kv_size + 3 * hidden * model.ffn_size)
    return tokens * (layers * (block + 4 * SEQUENCE * hidden) + 2 * hidden * VOCAB)


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, micro_batch_size=2, schedule="zb-h1"),
        pytest.param(
            Case("llama", pp=2, micro_batch_size=2, checkpointing=True, num_kv_heads=2), marks=pytest.mark.slow
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_operations_are_those_of_the_published_formula(gloo: GlooWorkers, tmp_path: Path, case: Case) -> None:
    gloo.run(2, profile_job, case, str(tmp_path), 0.0, {})
    by_layer: dict[str, dict[str, int]] = {}
    for layers in read(tmp_path, "flops.json").values():
        assert not by_layer.keys() & layers.keys()
        by_layer |= layers
    sums = {phase: sum(layer.get(phase, 0) for layer in by_layer.values()) for phase in ("forward", "backward")}
    expected = published_flops(case)
    assert sums["forward"] == pytest.approx(expected, rel=0.01)
    assert sums["backward"] == pytest.approx(2 * expected, rel=0.01)
    # Not in all alone: every block does the same.
    halves = [by_layer[name] for name in by_layer if name.endswith("mlp")]
    assert len(halves) == 3
    assert halves == [halves[0]] * 3
    # Of a Llama's three products, torch does not make the last again, whose output is not needed.
    assert halves[0].get("recomputed", 0) == (halves[0]["forward"] * 2 // 3 if case.checkpointing else 0)
