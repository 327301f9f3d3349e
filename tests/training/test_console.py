"""Lines of a run on a console that is no terminal."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipekit.config import parse_config
from pipekit.plan.decide import decide_run
from pipekit.plan.plan import Plan
from pipekit.plan.resources import Resources
from pipekit.plan.run_folder import RunFolder
from pipekit.training.console import ConsoleProgress, _show_layers, chatter_to, make_console, show_plan
from pipekit.training.language_model import LanguageModelTrial
from pipekit.training.loggers import MetricsFile
from pipekit.training.trial_loop import TrialResult


def planned(num_processes: int = 1, **sections: Any) -> Plan:
    train = {"steps": 10, "global_batch_size": 16, "micro_batch_size": 2}
    values = {"model": {"preset": "tiny", "vocab_size": 500}, "train": train, "run": {"dir": "runs/a b"}, **sections}
    return decide_run(parse_config(values), LanguageModelTrial, Resources(world_size=num_processes)).plan


def metrics(**changes: Any) -> dict[str, Any]:
    known = {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 12345.6, "step_time_s": 30.0}
    return {**known, **changes}


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def progress(stream: io.StringIO) -> ConsoleProgress:
    made = ConsoleProgress(make_console(stream), planned(), interval=4)
    made.on_trial_startup(0, None)
    return made


def test_the_first_the_last_and_every_interval_have_a_line(progress: ConsoleProgress, stream: io.StringIO) -> None:
    for step in range(1, 11):
        progress.on_metrics(step, metrics())
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "8/10", "10/10"]
    assert lines[0] == "step  1/10  loss 2.5000  lr 1.00e-03  12,346 tokens/s  ETA 4:30"
    assert lines[-1].endswith("ETA 0:00")


def test_speed_totals_and_memory_are_told_where_they_are_known(progress: ConsoleProgress, stream: io.StringIO) -> None:
    known = {"tokens": 1_500_000, "flops_per_s": 6.28e9, "peak_memory_bytes": 28.4e9}
    progress.on_metrics(4, metrics(**known))
    progress.on_metrics(8, metrics(**known, mfu=0.4278))
    on_cpu, on_gpu = stream.getvalue().splitlines()
    assert "12,346 tokens/s  6.28 GFLOP/s  1.5 M tokens  28.4 GB  ETA" in on_cpu
    assert "12,346 tokens/s  MFU 42.8%  1.5 M tokens  28.4 GB  ETA" in on_gpu


def test_an_evaluated_step_has_a_line_and_the_others_keep_its_loss(
    progress: ConsoleProgress, stream: io.StringIO
) -> None:
    progress.on_metrics(0, {"val_loss": 6.0})
    progress.on_metrics(3, metrics(val_loss=1.25))
    progress.on_metrics(4, metrics())
    first, evaluated, later = stream.getvalue().splitlines()
    assert first == "step  0/10  val loss 6.0000"
    assert all("val loss 1.2500" in line for line in (evaluated, later))


def test_waiting_for_data_is_told_from_a_twentieth_of_the_step_on(
    progress: ConsoleProgress, stream: io.StringIO
) -> None:
    # The first step has nothing read ahead, and does not count.
    progress.on_metrics(1, metrics(data_wait=0.9))
    progress.on_metrics(2, metrics(data_wait=0.4))
    progress.on_metrics(4, metrics(data_wait=0.0))
    assert "waited" not in stream.getvalue()
    progress.on_metrics(8, metrics(data_wait=0.8))
    assert "  waited for data: 11% of the step  ETA" in stream.getvalue().splitlines()[-1]
    progress.on_training_end(TrialResult(10, None, metrics(), None, 1.0))
    assert "waited for data: 40% of the steps; more data.workers read it faster" in stream.getvalue()


def test_the_end_tells_what_came_of_each_source(progress: ConsoleProgress, stream: io.StringIO) -> None:
    progress.on_metrics(0, {"val_loss": 6.0, "val_loss/web": 5.0, "val_loss/code": 7.0})
    progress.on_metrics(10, metrics(**{"samples/web": 1500, "samples/code": 7, "epochs/web": 0.25, "epochs/code": 1.0}))
    progress.on_training_end(TrialResult(10, None, metrics(), None, 1.0))
    assert "source web   1,500 samples, 0.25 epochs, validation loss 5.000" in stream.getvalue()
    assert "source code  7 samples, 1.00 epochs, validation loss 7.000" in stream.getvalue()


def test_a_checkpoint_has_a_line(progress: ConsoleProgress, stream: io.StringIO) -> None:
    progress.on_checkpoint_upload_end("step-00000004")
    assert stream.getvalue() == "step  4/10  saved runs/a b/checkpoints/step-00000004\n"


def test_the_end_tells_what_was_reached_and_what_to_type_next(progress: ConsoleProgress, stream: io.StringIO) -> None:
    progress.on_metrics(0, {"val_loss": 6.0})
    progress.on_metrics(10, metrics(val_loss=1.5))
    progress.on_training_end(TrialResult(10, Path("the/checkpoint"), metrics(), {"loss": 1.5}, 3700.0))
    text = stream.getvalue()
    assert "Trained 10 steps in 1:01:40: validation loss 6.000 → 1.500" in text
    assert "checkpoint  the/checkpoint\n" in text
    assert "pipekit export 'runs/a b' 'runs/a b'/export" in text
    assert "train.steps=20" in text
    assert not any(line.endswith(" ") for line in text.splitlines())


@pytest.mark.parametrize("prepared", [{}, {"tokenizer_path": "tokenizer.json"}])
def test_sampling_is_offered_where_there_is_a_tokenizer(prepared: dict[str, Any], stream: io.StringIO) -> None:
    progress = ConsoleProgress(make_console(stream), replace(planned(), prepared=prepared), interval=4)
    progress.on_trial_startup(0, None)
    progress.on_training_end(TrialResult(1, None, metrics(), None, 1.0))
    assert "Trained 1 step in 0:01" in stream.getvalue()
    assert ("pipekit generate 'runs/a b'" in stream.getvalue()) == bool(prepared)


def test_a_run_that_goes_on_says_so(stream: io.StringIO) -> None:
    progress = ConsoleProgress(make_console(stream), planned(), interval=4)
    progress.on_trial_startup(6, "step-00000006")
    progress.on_training_end(TrialResult(10, None, metrics(), None, 1.0))
    assert stream.getvalue().startswith("going on after step 6\n")
    assert "Trained steps 7 to 10 in 0:01\n" in stream.getvalue()


def test_a_run_that_had_been_trained_before_says_so_alone(stream: io.StringIO) -> None:
    progress = ConsoleProgress(make_console(stream), planned(), interval=4)
    progress.on_trial_startup(10, "step-00000010")
    progress.on_training_end(TrialResult(10, None, metrics(), None, 1.0))
    assert "has trained 10 of 10 steps already; set train.steps higher" in " ".join(stream.getvalue().split())
    assert "What next" not in stream.getvalue()


def test_a_plan_is_shown_with_its_stages(stream: io.StringIO) -> None:
    plan = planned(4, parallel={"pp": 2, "dp": 2, "schedule": "zb-v"})
    show_plan(plan, make_console(stream))
    lines = stream.getvalue().splitlines()
    assert "layout  pp=2 x dp=2 x tp=1, 4 processes, ZeRO 1" in lines
    assert "micro-batches of 2 on each of 2 replicas, zb-v" in stream.getvalue()
    rows = [line.split() for line in lines if line.strip()][-4:]
    assert [row[:3] for row in rows] == [
        [str(stage), str(rank), f"{plan.stage_parameters[stage]:,}"] for stage, rank in enumerate((0, 1, 1, 0))
    ]


DOOR = {"hf_names": "my_model:hf_names", "hf_config": "my_model:hf_config"}


@pytest.mark.parametrize(
    ("model", "reason", "flag"),
    [
        ({"preset": "tiny"}, None, ""),
        (
            {"preset": "tiny", "num_kv_heads": 2},
            "it has model.num_kv_heads=2 for 4 heads, and GPT2LMHeadModel knows no grouped queries",
            "--raw ",
        ),
        (
            {"builder": "examples.my_model:build_layers"},
            "it is built by examples.my_model:build_layers, and its configuration names no model.hf_names and "
            "model.hf_config",
            "--raw ",
        ),
        ({"builder": "examples.my_model:build_layers", **DOOR}, None, "--trust-code "),
    ],
    ids=["built-in", "grouped GPT-2", "own model", "own model with a door"],
)
def test_what_cannot_be_exported_is_said_before_and_the_end_tells_what_to_type(
    model: dict[str, Any], reason: str | None, flag: str
) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, highlight=False)
    config = parse_config({"model": model, "train": {"steps": 10}, "run": {"dir": "run"}})
    plan = replace(planned(), config=config)
    show_plan(plan, console)
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    if reason is None:
        assert "export" not in stream.getvalue()
    else:
        said = " ".join(" ".join(lines).split())
        assert said.endswith(f"pipekit export takes this model with --raw alone: {reason}")
    progress = ConsoleProgress(console, plan, interval=4)
    progress.on_trial_startup(0, None)
    progress.on_training_end(TrialResult(10, None, metrics(), None, 1.0))
    assert f"pipekit export {flag}run run/export" in stream.getvalue()


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["embed", "blocks.0", "blocks.1", "blocks.2", "head"], "embed, blocks.0-2, head"),
        (["blocks.0.a", "blocks.0.b", "norm", "blocks.1.a", "blocks.1.b"], "blocks.0, norm, blocks.1"),
        (["blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp"], "blocks.0.mlp, blocks.1"),
        (["encoder.0", "encoder.1", "decoder.0", "decoder.1"], "encoder.0-1, decoder.0-1"),
        ([], ""),
    ],
)  # fmt: skip
def test_whole_blocks_in_a_row_are_drawn_together(names: list[str], shown: str) -> None:
    assert _show_layers(names) == shown


def test_metrics_are_lines_of_json_and_those_that_come_again_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for start_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        file = MetricsFile(folder, print)
        file.on_trial_startup(start_step, None)
        for step in steps:
            file.on_metrics(step, metrics(grad_norm=float("inf"), val_accuracy=start_step / 2))
        file.on_trial_shutdown()
    lines = folder.metrics.read_text().splitlines()
    assert [line[:10] for line in lines] == [f'{{"step": {step}' for step in (1, 2, 3, 4)]
    assert all('"grad_norm": null' in line for line in lines)
    assert ['"val_accuracy": 1.0' in line for line in lines] == [False, False, True, True]


@pytest.mark.parametrize("fails", [False, True])
def test_what_libraries_write_goes_into_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str], fails: bool) -> None:
    log = tmp_path / "logs" / "rank-0.log"
    try:
        with chatter_to(log) as terminal:
            os.write(1, b"from a program\n")
            os.write(2, b"a warning\n")
            terminal.write("for the user\n")
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    sys.stdout.write("after it\n")
    assert log.read_text() == "from a program\na warning\n"
    assert capfd.readouterr().out == "for the user\nafter it\n"
