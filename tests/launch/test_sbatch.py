"""Batch scripts of SLURM, run to the end by stand-ins for its programs."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fork_server import run_pipekit
from pipekit.cli import app
from pipekit.errors import LaunchError
from pipekit.launch.sbatch import BatchJob, batch_script

ROOT = Path(__file__).resolve().parents[2]

# Starts as many tasks as the batch script says, each with its place, and ends with their highest exit code.
SRUN = """#!/bin/bash
while [ "${1:0:2}" = -- ]; do shift; done
pids=()
for rank in $(seq 0 $((TASKS - 1))); do
    SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 SLURM_NTASKS=$TASKS \
    SLURM_STEP_NUM_TASKS=$TASKS SLURM_STEP_TASKS_PER_NODE=$TASKS SLURM_STEP_NODELIST=localhost "$@" &
    pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
code=0
for pid in "${pids[@]}"; do
    while kill -0 $pid 2>/dev/null; do wait $pid; done
    wait $pid
    ended=$?
    [ $ended -gt $code ] && code=$ended
done
exit $code
"""
# Runs the script in the allocation that it asks for.
SBATCH = """#!/bin/bash
echo "Submitted batch job 7"
cd "$(sed -n 's/^#SBATCH --chdir=//p' "$1")" || exit
TASKS=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$1") SLURM_JOB_ID=7 bash "$1" >job.out 2>&1
echo "job ended: $?" >>job.out
"""


def job(folder: Path, *arguments: str, **options: object) -> BatchJob:
    return BatchJob(["c.yaml", *arguments], "c", folder, "python3", **options)  # type: ignore[arg-type]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and the programs of SLURM in PATH."""
    (tmp_path / "bin").mkdir()
    scontrol = '#!/bin/sh\necho "scontrol $*"\n'
    for name, text in {"srun": SRUN, "sbatch": SBATCH, "scontrol": scontrol}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    text = " ".join(f"word{index % 50}" for index in range(4000))
    (tmp_path / "text.txt").write_text("\n".join(text[start : start + 80] for start in range(0, len(text), 80)))
    config = {
        "run": {"dir": "runs/c", "device": "cpu", "timeout_s": 60},
        "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 16},
        "parallel": {"pp": 2},
        "train": {
            "steps": 2,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "sequence_length": 16,
            "precision": "fp32",
        },
        "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_the_script_says_what_slurm_is_asked_for(tmp_path: Path) -> None:
    text = batch_script(
        job(
            tmp_path / "a folder",
            "data.source=it's mine.txt",
            nodes=2,
            tasks_per_node=8,
            gpus_per_node=8,
            time="1-12",
            partition="a100,h100",
            account="me",
            more=["--constraint=ib"],
            environ={"NCCL_DEBUG": "a b"},
        ),
        log=tmp_path / "job-%j.log",
    )
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=c",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=1-12",
        "--partition=a100,h100",
        "--account=me",
        f"--chdir='{tmp_path}/a folder'",
        f"--output={tmp_path}/job-%j.log",
        "--open-mode=append",
        "--signal=USR1@120",
        "--requeue",
        "--constraint=ib",
    ]
    assert "export NCCL_DEBUG='a b'\n" in text
    assert """python3 -m pipekit train c.yaml 'data.source=it'"'"'s mine.txt' &""" in text
    assert "scontrol requeue" not in batch_script(job(tmp_path, requeue=False), log=tmp_path / "log")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "a b"}, "--partition 'a b': use letters"),
        ({"account": "x\n#SBATCH --uid=0"}, "--account"),
        ({"time": "soon"}, "--time 'soon' must be minutes"),
        ({"more": ["--x\nrm -r /"]}, r"--sbatch '--x\\nrm -r /' is no option"),
    ],
)
def test_options_that_would_write_lines_of_their_own_are_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        job(tmp_path, **options)
    with pytest.raises(LaunchError, match="line break"):
        batch_script(job(tmp_path / "a\nb"), log=tmp_path)


@pytest.mark.distributed
def test_a_submitted_script_starts_the_ranks_and_goes_back_into_the_queue(cluster: Path) -> None:
    python = cluster / "bin" / "rank"
    python.write_text('#!/bin/sh\necho "$SLURM_PROCID of $SLURM_NTASKS: $*"\nexit 75\n')
    python.chmod(0o755)
    arguments = ["--tasks-per-node", "2", "--python", str(python), "--submit", "c.yaml", "train.steps=4"]
    done = run_pipekit(["slurm", *arguments], cwd=cluster)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {cluster}/runs/c/job.sbatch\nSubmitted batch job 7\n"
    ranks, rest = (lines := (cluster / "job.out").read_text().splitlines())[:2], lines[2:]
    assert sorted(ranks) == [f"{rank} of 2: -m pipekit train c.yaml train.steps=4" for rank in range(2)]
    assert rest == ["saved; back into the queue", "scontrol requeue 7", "job ended: 75"]


def test_the_batch_shell_waits_for_the_ranks_whatever_it_is_told(cluster: Path) -> None:
    python = cluster / "bin" / "rank"
    python.write_text("#!/bin/sh\ntouch started\nsleep 1\nexit 75\n")
    python.chmod(0o755)
    script = cluster / "job.sbatch"
    script.write_text(batch_script(BatchJob(["c.yaml"], "c", cluster, str(python)), log=cluster / "log"))
    environ = {**os.environ, "TASKS": "1", "SLURM_JOB_ID": "7"}
    shell = subprocess.Popen(["bash", str(script)], cwd=cluster, env=environ, stdout=subprocess.PIPE, text=True)
    while not (cluster / "started").exists():
        time.sleep(0.02)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        shell.send_signal(signum)
        time.sleep(0.1)
    out, _ = shell.communicate(timeout=120)
    assert (shell.returncode, out) == (75, "saved; back into the queue\nscontrol requeue 7\n")


def test_a_layout_that_the_nodes_do_not_fit_is_refused(cluster: Path) -> None:
    done = run_pipekit(["slurm", "--nodes", "3", "c.yaml"], cwd=cluster)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not (cluster / "runs").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_submitted_script_trains(cluster: Path) -> None:
    done = run_pipekit(["slurm", "--tasks-per-node", "2", "--submit", "c.yaml"], cwd=cluster)
    assert done.returncode == 0, done.stderr
    assert "Trained 2 steps" in (cluster / "job.out").read_text()
    assert "job ended: 0" in (cluster / "job.out").read_text()


def page_scripts() -> tuple[str, str, str]:
    """The command of the page on several machines, the script that it writes, and a script of one's own."""
    page = (ROOT / "docs/multi-node.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^pipekit slurm .*$", page, flags=re.MULTILINE)
    written, own = re.findall(r"```bash\n(#!.*?)```", page, flags=re.DOTALL)
    return command, written, own


def test_the_page_shows_the_script_that_its_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, written, _ = page_scripts()
    planning = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    (tmp_path / "gpt2-xl.yaml").write_text(planning.partition("```yaml\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    _, slurm, *options = (word for word in shlex.split(command) if word != "--submit")
    assert CliRunner().invoke(app, [slurm, "--python", "/home/me/venv/bin/python", *options]).exit_code == 0
    script = (tmp_path / "runs/gpt2-xl/job.sbatch").read_text()
    assert script.replace(str(tmp_path), "/home/me/project") == written


def test_the_script_of_ones_own_starts_torchrun_as_torch_reads_it(cluster: Path) -> None:
    from torch.distributed.run import get_args_parser

    stand_ins = {"srun": 'exec "$@"', "scontrol": "printf 'node01\\nnode02\\n'", "torchrun": "printf '%s\\n' \"$@\""}
    for name, text in stand_ins.items():
        (cluster / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (cluster / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[01-02]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", "-eu"],
        input=page_scripts()[2],
        capture_output=True,
        text=True,
        env={**os.environ, **slurm},
        check=True,
    )
    read = get_args_parser().parse_args(done.stdout.splitlines())
    assert (read.nnodes, read.nproc_per_node, read.rdzv_endpoint) == ("2", "8", "node01:29500")
    assert (read.module, read.training_script, read.training_script_args[0]) == (True, "pipekit", "train")
