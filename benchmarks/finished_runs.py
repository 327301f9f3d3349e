"""Runs that finish: how many of them are reported as failed, although they have trained and saved.

    python benchmarks/finished_runs.py [--pp 300] [--dp 100] [--at-once 2] [--forked] [--out finished_runs.json]

Starts `pipekit train` as a user does, two new interpreters each, with a tiny model and two steps, at pp=2 and at dp=2,
each in a folder of its own, which is removed afterwards. Prints a table and writes JSON; exits with 1 where an exit
code is not 0 or its checkpoint is missing. A run takes 14 seconds of processor time, nearly all of it for imports;
`--forked` makes command and ranks forks of a process that has imported all, which train and end alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
import fork_server

CONFIG: dict[str, Any] = {
    "run": {"timeout_s": 60, "device": "cpu"},
    "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 16},
    "train": {
        "steps": 2,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "sequence_length": 16,
        "precision": "fp32",
        "eval_interval": 2,
        "eval_batches": 1,
    },
    "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
}


def play(folder: Path, layout: str, number: int, *, forked: bool) -> dict[str, Any]:
    """Train one run, and return how it ended."""
    run = folder / f"{layout}-{number}"
    arguments = ["train", "c.yaml", f"run.dir={run}", f"parallel.{layout}=2"]
    if forked:
        done = fork_server.run_pipekit(arguments, cwd=folder)
    else:
        command = [sys.executable, "-m", "pipekit", *arguments]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    has_saved = (run / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    shutil.rmtree(run, ignore_errors=True)
    failed = done.returncode != 0 or not has_saved
    return {"layout": f"{layout}=2", "exit_code": done.returncode, "has_saved": has_saved,
            "stderr": done.stderr[-2000:] if failed else ""}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=300, help="runs at pp=2; %(default)s")
    parser.add_argument("--dp", type=int, default=100, help="runs at dp=2; %(default)s")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time; %(default)s")
    parser.add_argument("--forked", action="store_true", help="start no new interpreters")
    parser.add_argument("--out", type=Path, default=Path("finished_runs.json"), help="JSON file; %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.at_once) as pool:
        folder = Path(name)
        words = ["def", "return", "class", "import", "for", "in", "range", "print", "yield", "while"]
        lines = (" ".join(words[(i * j + i // 3) % len(words)] for j in range(1, 9)) for i in range(1000))
        (folder / "text.txt").write_text("\n".join(lines))
        (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
        layouts = ["pp"] * arguments.pp + ["dp"] * arguments.dp
        # The first prepares the data.
        runs = [play(folder, layouts[0], 0, forked=arguments.forked)]
        others = range(1, len(layouts))
        runs += pool.map(lambda number: play(folder, layouts[number], number, forked=arguments.forked), others)
    fork_server.stop()
    arguments.out.write_text(json.dumps(runs, indent=1) + "\n")
    table = Table("layout", "runs", "reported as failed")
    failures = [run for run in runs if run["exit_code"] or not run["has_saved"]]
    for layout in ("pp=2", "dp=2"):
        own = [run for run in runs if run["layout"] == layout]
        table.add_row(layout, str(len(own)), str(sum(run in failures for run in own)))
    Console().print(table)
    for run in failures:
        print(f"{run['layout']}: exit code {run['exit_code']}\n{run['stderr']}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
