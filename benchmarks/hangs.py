"""Ranks that stop, dawdle or die at random moments of a run: the reports that name them, their delay, and the end.

    python benchmarks/hangs.py [--rounds 20] [--faults stop slow kill] [--seed 0] [--out hangs.json]

Trains a small GPT on four ranks with `pipekit train`, steps of well under a second, an evaluation and a checkpoint
every ten, and run.timeout_s=20. At a random moment of each round one random rank is stopped (SIGSTOP), sleeps for an
hour (slow, before a random step), or is killed (SIGKILL). Prints a table and writes JSON; exits with 1 where a
requirement is not met. A round takes half a minute to a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

WORLD_SIZE = 4
TIMEOUT_S = 20.0
WARNING_LIMIT_S = 30.0
# After the limit: processes that others wait for have to notice, and all have to end.
END_LIMIT_S = TIMEOUT_S + 15.0

TRIAL = """
import os, time
from pipekit.training.language_model import LanguageModelTrial

class Slow(LanguageModelTrial):
    def learning_rate(self, step):
        if [self.context.mpu.global_rank, step] == [int(os.environ["SLOW_RANK"]), int(os.environ["SLOW_STEP"])]:
            time.sleep(3600)
        return super().learning_rate(step)
"""

CONFIG: dict[str, Any] = {
    "run": {"timeout_s": TIMEOUT_S, "device": "cpu"},
    "model": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_positions": 32},
    "train": {
        "steps": 1_000_000,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "sequence_length": 32,
        "precision": "fp32",
        "eval_interval": 10,
        "eval_batches": 2,
    },
    "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
    "checkpoint": {"interval": 10, "keep": 2},
}

LAYOUTS = {"pp=4": {"pp": 4}, "pp=2 x dp=2": {"pp": 2, "dp": 2, "zero": 1}, "pp=2 x tp=2": {"pp": 2, "tp": 2}}


def ranks_of(folder: Path) -> dict[int, int]:
    """Process numbers of the ranks of a run, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "pipekit.launch.rank" in command and any(str(folder) in word for word in command):
                environ = dict(
                    word.split("=", 1) for word in (entry / "environ").read_text().split("\0") if "=" in word
                )
                found[int(environ["RANK"])] = int(entry.name)
        except (OSError, ValueError):
            continue
    return found


def wait_for(condition: Callable[[], Any], what: str, limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what} did not happen within {limit_s:g} s")
        time.sleep(0.05)


def play(folder: Path, fault: str, layout: str, rng: random.Random) -> dict[str, Any]:
    """Train until the fault, and return what the run said of it and when."""
    run = folder / "run"
    rank = rng.randrange(WORLD_SIZE)
    (folder / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "parallel": LAYOUTS[layout]}))
    command = [str(Path(sys.executable).with_name("pipekit")), "train", "c.yaml", f"run.dir={run}"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if fault == "slow":
        command.append("run.trial=trial:Slow")
        environ |= {"SLOW_RANK": str(rank), "SLOW_STEP": str(rng.randrange(8, 40))}
    stderr = folder / "stderr.txt"
    with stderr.open("w") as file:
        launcher = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
        )
    metrics = run / "metrics.jsonl"

    def num_lines() -> int:
        if launcher.poll() is not None:
            raise SystemExit(f"the run ended too soon:\n{stderr.read_text()}")
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    try:
        wait_for(lambda: num_lines() > 8, "step 8", 180)
        pids = ranks_of(run)
        if fault == "slow":
            last = -1
            while num_lines() > last:
                last = num_lines()
                time.sleep(2.0)
        else:
            time.sleep(rng.uniform(0, 10))
            os.kill(pids[rank], signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        fault_s = time.monotonic()
        step = num_lines()
        warned_s = None
        while launcher.poll() is None and time.monotonic() - fault_s < 3 * END_LIMIT_S:
            if warned_s is None and "warning: " in stderr.read_text():
                warned_s = time.monotonic() - fault_s
            time.sleep(0.05)
        ended_s = time.monotonic() - fault_s
        text = stderr.read_text()
        left = [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
    finally:
        for pid in [launcher.pid, *ranks_of(run).values()]:
            if Path(f"/proc/{pid}").exists():
                os.killpg(pid, signal.SIGKILL)
        launcher.wait()
    warning = next((line for line in text.splitlines() if line.startswith("warning: ")), "")
    error = next((line for line in text.splitlines() if line.startswith("error: ")), "")
    report = run / "logs" / "hang.txt"
    if fault == "kill":
        checks = {"names": f"rank {rank} was killed by SIGKILL" in error, "exit code": launcher.returncode == 3}
    else:
        action = r"(computing|receiving|sending|ending|reading|writing|calling|preparing|beginning) \S+"
        checks = {
            "warns": warned_s is not None and warned_s < WARNING_LIMIT_S,
            "warning names": re.search(rf": rank {rank} \(stage.*{action}", warning) is not None,
            "names": f"the run hangs: rank {rank} (stage" in error,
            "report": report.is_file() and len(report.read_text().splitlines()) == WORLD_SIZE + 3,
            "exit code": launcher.returncode == 4,
        }
    checks |= {"in time": ended_s < END_LIMIT_S, "nobody left": not left}
    return {
        "fault": fault,
        "layout": layout,
        "rank": rank,
        "after_step": step,
        "warned_s": warned_s,
        "ended_s": ended_s,
        "checks": checks,
        "warning": warning,
        "error": error,
        "table": report.read_text().splitlines()[2:] if report.is_file() else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each fault")
    parser.add_argument("--faults", nargs="+", default=["stop"], choices=["stop", "slow", "kill"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("hangs.json"), help="JSON file to write")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for fault in arguments.faults:
            for number in range(arguments.rounds):
                folder = Path(name) / f"{fault}-{number}"
                folder.mkdir()
                words = ["def", "return", "class", "import", "for", "in", "range", "print", "yield", "while"]
                lines = [" ".join(words[(i * j + i // 3) % len(words)] for j in range(1, 9)) for i in range(3000)]
                (folder / "text.txt").write_text("\n".join(lines))
                (folder / "trial.py").write_text(TRIAL)
                layout = list(LAYOUTS)[number % len(LAYOUTS)]
                rounds.append(play(folder, fault, layout, rng))
                sys.stderr.write(f"{json.dumps(rounds[-1])}\n")
    arguments.out.write_text(json.dumps(rounds, indent=1) + "\n")
    table = Table("fault", "rounds", "all held", "warned after (s)", "ended after (s)", "not held")
    for fault in arguments.faults:
        own = [entry for entry in rounds if entry["fault"] == fault]
        warned = [entry["warned_s"] for entry in own if entry["warned_s"] is not None]
        missed = [name for entry in own for name, held in entry["checks"].items() if not held]
        table.add_row(
            fault,
            str(len(own)),
            str(sum(all(entry["checks"].values()) for entry in own)),
            f"{min(warned):.1f} to {max(warned):.1f}" if warned else "-",
            f"{min(entry['ended_s'] for entry in own):.1f} to {max(entry['ended_s'] for entry in own):.1f}",
            ", ".join(sorted(set(missed))) or "-",
        )
    Console().print(table)
    sys.exit(0 if all(all(entry["checks"].values()) for entry in rounds) else 1)


if __name__ == "__main__":
    main()
