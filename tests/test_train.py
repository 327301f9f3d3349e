"""`pipekit train` from end to end, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fork_server import run_joining
from gloo_workers import free_port
from hand_made import examples_at_work
from train_runs import losses, metrics, pipekit, ranks_of, wait_for, write_workspace

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[1]
METRIC_KEYS = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "step_time_s", "data_wait", "data_wait_s"}
METRIC_KEYS |= {"samples", "tokens", "flops", "flops_per_s"}
# Not in every line.
FURTHER_KEYS = {"val_loss", "eval_time_s", "save_time_s", "peak_memory_bytes"}
FURTHER_KEYS |= {f"peak_memory_bytes_rank{rank}" for rank in range(2)}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a configuration and a cache, shared by the module."""
    return write_workspace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def base_run(workspace: Path) -> str:
    """The output of a whole run in `runs/base`, whose ranks are new interpreters, as for a user."""
    done = pipekit(workspace, "train", "c.yaml", "logging.tensorboard=true", "logging.wandb=true", fork_ranks=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_leaves_what_it_promises(workspace: Path, base_run: str) -> None:
    folder = workspace / "runs/base"
    records = metrics(workspace, "runs/base")
    assert [record["step"] for record in records] == list(range(13))
    assert all(set(record) - FURTHER_KEYS == METRIC_KEYS for record in records[1:])
    assert [(record["samples"], record["tokens"]) for record in records[1:]] == [
        (8 * step, 8 * 32 * step) for step in range(1, 13)
    ]
    assert [record["flops"] / records[1]["flops"] for record in records[1:]] == pytest.approx([*range(1, 13)])
    assert [record["step"] for record in records if "eval_time_s" in record] == [0, 6, 12]
    assert [record["step"] for record in records if "save_time_s" in record] == [5, 9]
    peaks = [record["peak_memory_bytes"] for record in records if "peak_memory_bytes" in record]
    assert peaks == sorted(peaks)
    # The ranks meet before each save.
    told = [[each[key] for each in records if (key := f"peak_memory_bytes_rank{rank}") in each] for rank in (0, 1)]
    assert peaks[-1] == max(map(max, told))
    assert all(2e7 < peak < 2e10 for each in told for peak in each)
    assert records[12]["val_loss"] < records[0]["val_loss"]
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))] == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    assert list((folder / "tensorboard").glob("events*"))
    assert list((folder / "wandb").glob("offline-run-*"))
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    tracked = b"".join(wandb_records(path.read_bytes()))
    plan = re.search(rb'\{[^{}]*"stage_parameters"[^{}]*\}', tracked)
    assert plan is not None
    assert json.loads(plan[0])["pp"] == 2
    assert re.search(rb'"global_batch_size": ?8', tracked)
    assert b"runs/base/checkpoints/step-00000012" in tracked
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [
        ("start", 0),
        ("checkpoint", 4),
        ("checkpoint", 8),
        ("checkpoint", 12),
        ("end", 12),
    ]
    assert events[0]["text"] == "pp=2 x dp=1 x tp=1 on cpu; 1f1b, 4 micro-batches; fp32"
    page = (folder / "report.html").read_text()
    assert "finished</span>, step 12 of 12" in page
    assert all(f"{records[12][name]:.4g}" in page for name in ("loss", "val_loss"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["vocab_size"] == 300
    assert ranks_of("runs/base") == []


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a file of Weights & Biases, which is a log of LevelDB behind 7 bytes of its own."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768  # no header fits into the rest of the block
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_the_console_shows_the_plan_progress_and_what_next(base_run: str) -> None:
    for text in (
        "parameters, 8 layers",
        "pp=2 x dp=1 x tp=1, 2 processes",
        "cpu, fp32",
        "embed, position, blocks.0",
        "step 12/12  loss",
        "tokens/s  ",
        "FLOP/s  3.1 k tokens  ",
        "checkpoint  runs/base/checkpoints/step-00000012",
        "page        runs/base/report.html",
        "pipekit generate runs/base",
        "pipekit export runs/base",
    ):
        assert text in base_run
    assert "DeepSpeed" not in base_run
    assert "Warning" not in base_run


def test_the_saved_configuration_trains_and_goes_on(workspace: Path, base_run: str) -> None:
    shutil.copytree(workspace / "runs/base", workspace / "runs/longer")
    done = pipekit(
        workspace, "train", "runs/base/config.yaml", "run.dir=runs/longer", "train.steps=14", "parallel.pp=1"
    )
    assert done.returncode == 0, done.stderr
    assert "going on after step 12" in done.stdout
    assert [record["step"] for record in metrics(workspace, "runs/longer")] == list(range(15))
    # It has gone on in its run of Weights & Biases too.
    ids = [path.name.rpartition("-")[2] for path in (workspace / "runs/longer/wandb").glob("offline-run-*")]
    assert len(ids) == 2
    assert len(set(ids)) == 1
    again = pipekit(workspace, "train", "runs/base/config.yaml", "run.dir=runs/longer", "train.steps=14")
    assert again.returncode == 0
    assert "has trained 14 of 14 steps already" in again.stdout


def test_export_and_generate(workspace: Path, base_run: str) -> None:
    exported = pipekit(workspace, "export", "runs/base", "out")
    assert exported.returncode == 0, exported.stderr
    assert "checked against transformers" in exported.stdout
    check = json.loads((workspace / "out/export_check.json").read_text())
    assert check["max_logit_difference"] <= 1e-5
    assert check["num_logits"] > 0
    options = ("--prompt", "def return", "--max-new-tokens", "12", "--seed", "3")
    texts = [pipekit(workspace, "generate", source, *options).stdout for source in ("runs/base", "out")]
    assert texts[0] == texts[1]
    assert texts[0].startswith("def return")
    assert len(texts[0]) > len("def return\n")


@pytest.mark.slow  # tests/faults kills runs at random moments
def test_killed_and_started_again_it_gives_the_same_losses(workspace: Path, base_run: str) -> None:
    command = [sys.executable, "-m", "pipekit", "train", "c.yaml", "run.dir=runs/killed", "train.steps=2000"]
    command += ["scheduler.decay_steps=12"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        command,
        cwd=workspace,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    path = workspace / "runs/killed/metrics.jsonl"
    try:
        wait_for(lambda: path.is_file() and path.read_text().count("\n") > 7, "step 6 of the run to be killed")
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    wait_for(lambda: not ranks_of("runs/killed"), "the end of the killed launcher's ranks")
    shutil.copytree(workspace / "runs/killed", workspace / "runs/killed-pp1")

    steps = max(12, 4 + 4 * (len(losses(workspace, "runs/killed")) // 4))
    reference = losses(workspace, "runs/base")
    if steps > 12:
        # The machine was quick: compare with an uninterrupted run of as many steps.
        whole = pipekit(
            workspace, "train", "c.yaml", "run.dir=runs/whole", f"train.steps={steps}", "scheduler.decay_steps=12"
        )
        assert whole.returncode == 0, whole.stderr
        reference = losses(workspace, "runs/whole")
    overrides = (f"train.steps={steps}", "scheduler.decay_steps=12")
    again = pipekit(workspace, "train", "c.yaml", "run.dir=runs/killed", *overrides)
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stdout
    assert losses(workspace, "runs/killed") == reference
    other = pipekit(workspace, "train", "c.yaml", "run.dir=runs/killed-pp1", "parallel.pp=1", *overrides)
    assert other.returncode == 0, other.stderr
    assert losses(workspace, "runs/killed-pp1") == pytest.approx(reference, rel=1e-5)


DYING_TRIAL = """
import os, signal
from pathlib import Path
from pipekit import LanguageModelTrial

def listening():
    '''Addresses on which this process listens, in hexadecimal, as Linux tells them.'''
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    lines = [line for name in ("tcp", "tcp6") for line in Path("/proc/self/net", name).read_text().splitlines()[1:]]
    rows = [line.split() for line in lines]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]

class Dying(LanguageModelTrial):
    always = False

    def learning_rate(self, step):
        run, rank = self.context.folder.path, self.context.mpu.global_rank
        if step == 1:
            (run / f"listening-{rank}").write_text(" ".join(listening()))
        if step == 6 and rank == 1 and (self.always or not (run / "died").exists()):
            (run / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().learning_rate(step)

class Doomed(Dying):
    always = True
"""


def test_a_rank_that_dies_once_leaves_no_trace_in_the_losses(workspace: Path, base_run: str) -> None:
    (workspace / "dying.py").write_text(DYING_TRIAL)
    done = pipekit(workspace, "train", "c.yaml", "run.dir=runs/dying", "run.trial=dying:Dying", "run.restarts=2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"rank 1 was killed by SIGKILL.*; restart 1 of 2, from step-00000004 \(see ", done.stderr)
    assert "going on after step 4" in done.stdout
    assert losses(workspace, "runs/dying") == losses(workspace, "runs/base")
    (record,) = [json.loads(line) for line in (workspace / "runs/dying/failures.jsonl").read_text().splitlines()]
    assert (record["rank"], record["checkpoint"]) == (1, "step-00000004")
    events = [json.loads(line) for line in (workspace / "runs/dying/events.jsonl").read_text().splitlines()]
    starts = [event["text"].partition("; going on from ")[2] for event in events if event["event"] == "start"]
    assert starts == ["", "step-00000004"]
    # Nobody on another machine reaches the ranks of a run on one.
    for rank in range(2):
        addresses = (workspace / f"runs/dying/listening-{rank}").read_text().split()
        assert len(addresses) >= 1
        assert {address.partition(":")[0] for address in addresses} == {"0100007F"}


@pytest.mark.slow
def test_a_rank_that_dies_at_the_same_step_again_is_not_started_for_ever(workspace: Path, base_run: str) -> None:
    (workspace / "dying.py").write_text(DYING_TRIAL)
    run = ("run.dir=runs/doomed", "run.trial=dying:Doomed", "run.restarts=9")
    done = pipekit(workspace, "train", "c.yaml", *run)
    assert done.returncode == 3
    assert done.stderr.endswith(
        "failed twice after step-00000004 without a newer checkpoint, and is not started again\n"
    )
    assert len((workspace / "runs/doomed/failures.jsonl").read_text().splitlines()) == 2
    assert ranks_of("runs/doomed") == []


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port={port}", "-m"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators=2", "--master_port={port}", "--module"],
}


# Another test trains under torchrun as well.
def test_a_damaged_weight_is_named_and_the_checkpoint_before_is_taken(workspace: Path, base_run: str) -> None:
    run = workspace / "runs/damaged"
    shutil.copytree(workspace / "runs/base", run)
    shutil.rmtree(run / "checkpoints/step-00000012")
    (run / "checkpoints/latest").write_text("step-00000008\n")
    file = run / "checkpoints/step-00000008/exp_avg-0001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = pipekit(workspace, "train", "c.yaml", "run.dir=runs/damaged")
    assert result.returncode == 0, result.stderr
    assert re.search(r"exp_avg-0001.safetensors: damaged \(exp_avg of '\S+' has changed", result.stdout)
    assert "step-00000004 instead" in result.stdout
    assert "going on after step 4" in result.stdout
    assert losses(workspace, "runs/damaged") == losses(workspace, "runs/base")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_under_another_launcher_it_joins(workspace: Path, base_run: str, launcher: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    run = f"runs/{launcher}"
    done = subprocess.run(
        [
            *(sys.executable, *(argument.format(port=port) for argument in LAUNCHERS[launcher])),
            *("pipekit", "train", "c.yaml", f"run.dir={run}"),
        ],
        cwd=workspace,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses(workspace, run) == losses(workspace, "runs/base")
    assert done.stdout.count("Trained 12 steps") == 1
    assert "embed, position, blocks.0" in done.stdout


@pytest.mark.slow
def test_torchrun_starts_ranks_again_itself(workspace: Path, base_run: str) -> None:
    (workspace / "dying.py").write_text(DYING_TRIAL)
    run = ("run.dir=runs/agents", "run.trial=dying:Dying", "run.restarts=2")
    done = torchrun(workspace, "train", "c.yaml", *run, options=("--max-restarts=1",))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run.restarts=2 is ignored: starting ranks again is left to torchrun") == 2
    assert "going on after step 4" in done.stdout
    assert losses(workspace, "runs/agents") == losses(workspace, "runs/base")
    assert not (workspace / "runs/agents/.lock").exists()


def torchrun(workspace: Path, *arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run `pipekit` with these arguments on two ranks of torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launcher = [argument.format(port=port) for argument in LAUNCHERS["torchrun"]]
    return subprocess.run(
        [sys.executable, *launcher[:2], *options, *launcher[2:], "pipekit", *arguments],
        cwd=workspace,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(workspace)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.parametrize("launcher", ["pipekit", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_stages_of_equal_seconds_train_the_same(workspace: Path, base_run: str, launcher: str) -> None:
    run = f"runs/profile-{launcher}"
    arguments = ("train", "c.yaml", f"run.dir={run}", "parallel.partition=profile", "train.steps=3")
    arguments += ("scheduler.decay_steps=12", "train.eval_interval=null")
    if launcher == "torchrun":
        done = torchrun(workspace, *arguments)
    else:
        done = pipekit(workspace, *arguments, environ={"HOME": str(workspace)})
    assert done.returncode == 0, done.stderr
    assert losses(workspace, run) == pytest.approx(losses(workspace, "runs/base")[:3], rel=1e-5)


def test_auto_chooses_a_layout_for_the_ranks_and_says_why(workspace: Path) -> None:
    config = yaml.safe_load((workspace / "c.yaml").read_text())
    config["parallel"] = "auto"
    config["train"] |= {"steps": 2, "eval_interval": None}
    (workspace / "auto.yaml").write_text(yaml.safe_dump(config))
    done, other = run_joining(
        ["pipekit", "train", "auto.yaml", "run.dir=runs/auto"], cwd=workspace, world_size=2, port=free_port()
    )
    assert (done.returncode, other.returncode) == (0, 0), done.stderr
    assert "chosen  pp=" in done.stdout
    assert "the fastest of" in done.stdout
    stored = yaml.safe_load((workspace / "runs/auto/config.yaml").read_text())
    assert stored["parallel"]["pp"] * stored["parallel"]["dp"] == 2
    assert not stored["parallel"]["auto"]
    assert len(losses(workspace, "runs/auto")) == 2


MEASURING_TRIAL = """
from pipekit import LanguageModelTrial

class Measuring(LanguageModelTrial):
    def validation_metrics(self):
        return {
            "accuracy": lambda logits, labels: (logits.argmax(-1) == labels).float().mean(),
            "replica": lambda logits, labels: labels.float().mean() * 0 + self.context.mpu.data_parallel_rank,
        }
"""


def test_a_trial_of_ones_own_adds_metrics_that_are_right_under_every_layout(workspace: Path, base_run: str) -> None:
    (workspace / "measuring.py").write_text(MEASURING_TRIAL)
    accuracies = []
    for name, layout in (("one", ["parallel.pp=1"]), ("four", ["parallel.pp=2", "parallel.dp=2"])):
        overrides = ("run.trial=measuring:Measuring", f"run.dir=runs/{name}", "train.steps=6", *layout)
        done = pipekit(workspace, "train", "c.yaml", *overrides)
        assert done.returncode == 0, done.stderr
        last = metrics(workspace, f"runs/{name}")[-1]
        accuracies.append(last["val_accuracy"])
        assert last["val_replica"] == (0.5 if name == "four" else 0.0)
    assert 0 < accuracies[0] < 1
    assert accuracies[1] == pytest.approx(accuracies[0], rel=1e-3)


UNIT_TRIAL = """
from pathlib import Path
from pipekit import LanguageModelTrial, ModelParallelUnit

class ReportsLast(ModelParallelUnit):
    @property
    def should_report_metrics(self):
        return self.global_rank == self.layout.world_size - 1

class Reporting(LanguageModelTrial):
    @classmethod
    def build_mpu(cls, layout, *, placement, timeout_s):
        return ReportsLast(layout, placement=placement, timeout_s=timeout_s)

class Silent(ModelParallelUnit):
    should_report_metrics = False

class Wrong(LanguageModelTrial):
    @classmethod
    def build_mpu(cls, layout, *, placement, timeout_s):
        return Silent(layout, placement=placement, timeout_s=timeout_s)

class WithoutEnd(LanguageModelTrial):
    @property
    def tokenizer_file(self):
        return Path("without-end/tokenizer.json")
"""


def test_a_trial_brings_its_own_unit(workspace: Path, base_run: str) -> None:
    (workspace / "own_unit.py").write_text(UNIT_TRIAL)
    overrides = ("parallel.dp=2", "parallel.order=[data, pipe, tensor]", "train.steps=6", "scheduler.decay_steps=12")
    done = pipekit(workspace, "train", "c.yaml", "run.trial=own_unit:Reporting", "run.dir=runs/unit", *overrides)
    assert done.returncode == 0, done.stderr
    assert losses(workspace, "runs/unit") == pytest.approx(losses(workspace, "runs/base")[:6], rel=1e-4)
    assert "step 6/6  loss" in (workspace / "runs/unit/logs/rank-3.log").read_text() + done.stdout
    assert "in the order data, pipe, tensor, 4 processes" in done.stdout


def test_a_trials_unit_that_does_not_fit_is_refused_before_training(workspace: Path) -> None:
    (workspace / "own_unit.py").write_text(UNIT_TRIAL)
    done = pipekit(workspace, "train", "c.yaml", "run.trial=own_unit:Wrong", "run.dir=runs/wrong")
    assert done.returncode == 2
    assert "the ranks' model-parallel units do not fit together" in done.stderr
    assert "should_report_metrics is True on the ranks []" in done.stderr
    assert not (workspace / "runs/wrong/metrics.jsonl").exists()


def test_a_trials_tokenizer_without_an_end_is_refused_before_training(workspace: Path) -> None:
    (workspace / "own_unit.py").write_text(UNIT_TRIAL)
    (workspace / "without-end").mkdir()
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(workspace / "without-end/tokenizer.json"))
    done = pipekit(workspace, "train", "c.yaml", "run.trial=own_unit:WithoutEnd", "run.dir=runs/without-end")
    assert done.returncode == 2
    assert "WithoutEnd.tokenizer_file: data.tokenizer='without-end/tokenizer.json': no token that ends a" in done.stderr
    assert not (workspace / "runs/without-end/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "name",
    [
        # The README's first line trains it; the others are longer ways to the same functions.
        pytest.param(path.name, marks=() if path.stem == "gpt_stdlib" else pytest.mark.slow)
        for path in sorted((ROOT / "examples").glob("*.yaml"))
    ],
)
def test_every_shipped_example_trains(tmp_path: Path, name: str) -> None:
    overrides = [
        "train.steps=2",
        "data.max_bytes=1500000",
        f"data.cache_dir={tmp_path / 'cache'}",
        "train.eval_batches=1",
    ]
    done = pipekit(examples_at_work(tmp_path), "train", f"examples/{name}", *overrides)
    assert done.returncode == 0, done.stderr
    assert "Trained 2 steps" in done.stdout


@pytest.mark.slow
def test_other_schedules_train_from_the_configuration_and_are_drawn(workspace: Path, base_run: str) -> None:
    for schedule in ("zb-v", "auto"):
        run = f"runs/schedule-{schedule}"
        done = pipekit(workspace, "train", "c.yaml", f"run.dir={run}", f"parallel.schedule={schedule}",
                       "profile.start=9", "profile.steps=3", "checkpoint.interval=null")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert losses(workspace, run) == pytest.approx(losses(workspace, "runs/base"), rel=1e-4)
        assert (workspace / run / "schedule.csv").read_text().count("\n") == 2
        drawn = workspace / run / "profile" / "step-00000012"
        measured = json.loads(drawn.with_suffix(".json").read_text())["measured"]
        kinds = {action.lstrip("0123456789")[0] for rank in measured["ranks"] for action, _, _ in rank}
        if schedule == "auto":  # which backwards are worth splitting depends on what was measured
            assert kinds in ({"F", "B"}, {"F", "I", "W"}, {"F", "B", "I", "W"})
        else:
            assert kinds == {"F", "I", "W"}
        assert drawn.with_suffix(".txt").read_text().startswith("simulated\nrank 0 ")
        assert drawn.with_suffix(".svg").stat().st_size > 1000


@pytest.mark.slow  # the engine's tests load what other layouts saved
def test_a_run_goes_on_under_another_schedule(workspace: Path, base_run: str) -> None:
    first = pipekit(workspace, "train", "c.yaml", "run.dir=runs/switch", "parallel.schedule=zb-v", "train.steps=6",
                    "scheduler.decay_steps=12")  # fmt: skip
    assert first.returncode == 0, first.stderr
    second = pipekit(workspace, "train", "runs/switch/config.yaml", "parallel.schedule=zb-h1", "train.steps=12")
    assert second.returncode == 0, second.stderr
    assert losses(workspace, "runs/switch") == pytest.approx(losses(workspace, "runs/base"), rel=1e-4)
