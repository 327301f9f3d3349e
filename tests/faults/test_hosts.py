"""Runs on three hosts, over ssh: what they compute, and what comes of a host that is cut off.

The hosts are network namespaces with an sshd each, see `faults.hosts`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.hosts import Hosts, why_not
from pipekit.checkpoint.overview import find_faults
from pipekit.launch.hosts import read_hostfile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(400),
]

CONFIG: dict[str, Any] = {
    # A machine that has one rank alone would compute it with more threads, and sum in another order.
    "run": {"dir": "runs/three", "device": "cpu", "timeout_s": 30, "threads_per_process": 1},
    "model": {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_positions": 32},
    "parallel": {"pp": 3},
    "train": {
        "steps": 12,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "sequence_length": 32,
        "precision": "fp32",
        "eval_interval": 6,
        "eval_batches": 2,
    },
    "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
    "checkpoint": {"interval": 4, "keep": 2},
}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    (tmp_path / "hosts").mkdir()
    (tmp_path / "cache").mkdir()
    words = ["def", "return", "class", "import", "for", "in", "range", "print"]
    lines = (" ".join(words[(i * j + i // 3) % len(words)] for j in range(1, 9)) for i in range(2000))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    with Hosts(tmp_path / "hosts", 3, private=tmp_path / "cache") as hosts:
        yield hosts


def launch(hosts: Hosts, *arguments: str) -> subprocess.Popen[str]:
    options = ["--hostfile", str(hosts.hostfile), "--ssh_args", f"-F {hosts.ssh_config}"]
    return hosts.start(
        [sys.executable, "-m", "pipekit", "launch", *options, "train", "c.yaml", *arguments],
        cwd=hosts.folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    deadline_s = time.monotonic() + 120
    while not (folder / "checkpoints/latest").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def num_processes(hosts: Hosts) -> int:
    """Processes of runs on all hosts, which share the numbers of processes."""
    return int(hosts.on("worker-1", "ps ax -o args | grep -c '[p]ipekit' || true"))


def test_three_hosts_train_to_the_losses_of_one_machine(hosts: Hosts, tmp_path: Path) -> None:
    assert read_hostfile(hosts.hostfile) == {"worker-1": 1, "worker-2": 1, "worker-3": 1}
    process = launch(hosts)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "Trained 12 steps" in out
    # Each host has prepared the text for itself, as the cache is not shared.
    for name in hosts.names:
        assert hosts.on(name, f"ls {tmp_path}/cache/data/*/meta.json | wc -l").strip() == "1"
    alone = [sys.executable, "-m", "pipekit", "train", "c.yaml", "run.dir=runs/one", "data.cache_dir=cache-of-one"]
    subprocess.run(alone, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=200)
    assert losses(tmp_path / "runs/three") == losses(tmp_path / "runs/one")
    assert len(losses(tmp_path / "runs/three")) == 12


def test_a_host_that_is_cut_off_is_named_within_the_limit_and_the_run_goes_on_when_it_is_back(
    hosts: Hosts, tmp_path: Path
) -> None:
    arguments = ("train.steps=1000000", "train.eval_interval=null")
    process = launch(hosts, *arguments)
    wait_for_checkpoint(process, tmp_path / "runs/three")
    hosts.cut("worker-3")
    began_s = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - began_s < 30
    assert process.returncode == 3
    assert "error: worker-3: " in errors
    assert "worker-1" not in errors
    hosts.restore("worker-3")
    done = len(losses(tmp_path / "runs/three"))
    process = launch(hosts, f"train.steps={done + 10}", "train.eval_interval=null")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert len(losses(tmp_path / "runs/three")) == done + 10
    assert num_processes(hosts) == 0


def test_a_host_that_is_cut_off_and_comes_back_is_started_again_by_the_launcher(hosts: Hosts, tmp_path: Path) -> None:
    process = launch(hosts, "train.steps=150", "train.eval_interval=null", "run.restarts=1")
    wait_for_checkpoint(process, tmp_path / "runs/three")
    hosts.cut("worker-3")
    failures = tmp_path / "runs/three/failures.jsonl"
    deadline_s = time.monotonic() + 120
    while not failures.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    time.sleep(5.0)
    hosts.restore("worker-3")
    out, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    (record,) = map(json.loads, failures.read_text().splitlines())
    assert record["host"] == "worker-3"
    assert "Trained" in out
    assert "is ignored" not in errors + out
    alone = ("train.steps=150", "train.eval_interval=null", "run.dir=runs/one", "data.cache_dir=cache-of-one")
    command = [sys.executable, "-m", "pipekit", "train", "c.yaml", *alone]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=200)
    assert losses(tmp_path / "runs/three") == losses(tmp_path / "runs/one")


def test_when_the_launcher_is_killed_all_hosts_end(hosts: Hosts, tmp_path: Path) -> None:
    process = launch(hosts, "train.steps=1000000")
    wait_for_checkpoint(process, tmp_path / "runs/three")
    assert num_processes(hosts) >= 6
    process.kill()
    process.communicate()
    deadline_s = time.monotonic() + 120
    while num_processes(hosts):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_a_host_that_is_down_is_told_before_anything_starts(hosts: Hosts, tmp_path: Path) -> None:
    hosts.cut("worker-2")
    process = launch(hosts)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3
    assert errors.startswith("error: worker-2: cannot be reached: ssh ended with exit code 255, and said:\n")
    assert not (tmp_path / "runs").exists()


def test_a_text_that_differs_on_one_host_is_an_error_before_a_step(hosts: Hosts, tmp_path: Path) -> None:
    hosts.on("worker-2", f"cp {tmp_path}/text.txt {tmp_path}/cache/text.txt; echo more >>{tmp_path}/cache/text.txt")
    for name in ("worker-1", "worker-3"):
        hosts.on(name, f"cp {tmp_path}/text.txt {tmp_path}/cache/text.txt")
    (tmp_path / "cache/text.txt").write_text((tmp_path / "text.txt").read_text())
    process = launch(hosts, "data.source=cache/text.txt")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith("error: worker-2: rank 1: data.source: the text of this machine gives other tokens")
    assert not (tmp_path / "runs/three/checkpoints").exists()


def test_hosts_that_share_no_folder_lose_nothing_with_any_one_of_them(hosts: Hosts, tmp_path: Path) -> None:
    own = ("run.dir=cache/run", "train.eval_interval=null")
    process = launch(hosts, *own)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "run.dir=cache/run: what worker-1 writes there is not seen on worker-2, so they do not share it" in errors
    for steps, lost in ((6, "worker-1"), (9, "worker-3"), (12, "worker-2")):
        process = launch(hosts, *own, "checkpoint.storage=local", f"train.steps={steps}", "scheduler.decay_steps=12")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        hosts.on(lost, f"rm -r {tmp_path}/cache/run")
    gather = [sys.executable, "-m", "pipekit", "checkpoints", "gather", "cache/run", "--hostfile", str(hosts.hostfile)]
    process = hosts.start(
        [*gather, "--ssh_args", f"-F {hosts.ssh_config}"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out.endswith("cache/run/checkpoints/step-00000012 is whole on this machine\n")
    assert find_faults(tmp_path / "cache/run/checkpoints/step-00000012") == []
    metrics = hosts.on("worker-3", f"cat {tmp_path}/cache/run/metrics.jsonl")
    alone = ["run.dir=runs/one", "data.cache_dir=cache-of-one", "train.eval_interval=null", "scheduler.decay_steps=12"]
    command = [sys.executable, "-m", "pipekit", "train", "c.yaml", *alone]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=200)
    assert [json.loads(line)["loss"] for line in metrics.splitlines()] == losses(tmp_path / "runs/one")


def test_an_examination_of_hosts_tries_the_network_between_them(hosts: Hosts, tmp_path: Path) -> None:
    def examine(*options: str) -> dict[str, list[dict[str, Any]]]:
        common = ["--hostfile", str(hosts.hostfile), "--ssh_args", f"-F {hosts.ssh_config}", "--json"]
        process = hosts.start(
            [sys.executable, "-m", "pipekit", "doctor", *common, *options],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, errors = process.communicate(timeout=280)
        rows = json.loads(out)["rows"]
        assert process.returncode == int(any(row["verdict"] == "bad" for row in rows)), errors
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            found.setdefault(row["host"], []).append(row)
        return found

    found = examine()
    assert list(found) == [*hosts.names, "all hosts"]
    reduce = next(row for row in found["all hosts"] if row["check"] == "3 ranks on 3 hosts: all-reduce")
    assert reduce["measured"]["hosts"] == hosts.names
    # An address at which nobody listens: as if ssh alone passed between the hosts.
    (row,) = examine("--master_addr", "10.0.0.99", "--exclude", "worker-3")["all hosts"]
    assert (row["check"], row["verdict"]) == ("2 ranks on 2 hosts", "bad")
    hosts.cut("worker-2")
    found = examine("--exclude", "worker-3")
    assert [(row["check"], row["verdict"]) for row in found["worker-2"]] == [("ssh", "bad")]
    assert "all hosts" not in found
    assert len(found["worker-1"]) > 20
