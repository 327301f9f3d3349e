"""Import and export of a Hugging Face model, measured: memory, and speed over that of a plain copy.

    python benchmarks/transfer.py [--models gpt2-xl qwen2.5-1.5b] [--rounds 3] [--folder .] [--json transfer.json]

Writes a model of 1.5B parameters with random weights in the format of Hugging Face, imports it and exports it again,
each in a process of its own, and copies its files as fast as the disk allows, in turns. Memory is the peak of the
process above what it held when its libraries were loaded; the proof is included. Speed is the bytes written in a second
without the proof, over those of the copy. Files are dropped from the page cache before they are read, and whatever is
written is on the disk when a time ends. Prints a table and writes JSON; exits with 1 where a requirement is not met.
Takes up to 25 GB of the folder, and about five minutes for each model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipekit.config import parse_config
from pipekit.inference.hugging_face import theirs_of
from pipekit.inference.safetensors_folder import SafetensorsFolder, write_shards
from pipekit.layers.sequential import SequentialModel
from pipekit.models.family import TransformerFamily

MEMORY_LIMIT_GB, LEAST_SPEED = 1.5, 0.5
DTYPES = {"gpt2-xl": "float32", "qwen2.5-1.5b": "bfloat16"}

# Prints what a process held before and at most, and the seconds until the last weights were written.
CHILD = r"""
import json, re, sys, time
import torch, transformers
import pipekit.inference.{module} as module
from pipekit.tensors.host_memory import return_freed_memory
return_freed_memory()  # as the commands do
def held_bytes(what):
    return 1024 * int(re.search(what + r":\s+(\d+) kB", open("/proc/self/status").read())[1])

written_s, write = [], module.{write}
def timed(*arguments, **options):
    result = write(*arguments, **options)
    written_s.append(time.perf_counter())
    return result
module.{write} = timed
before_bytes, began_s = held_bytes("VmRSS"), time.perf_counter()
module.{function}(*sys.argv[1:], **{options})
peak_bytes = held_bytes("VmHWM")
print(json.dumps(dict(
    before_bytes=before_bytes, peak_bytes=peak_bytes,
    written_s=written_s[-1] - began_s, whole_s=time.perf_counter() - began_s,
)))
"""


def write_model(folder: Path, preset: str) -> int:
    """Write a model with random weights, a tensor at a time, and return its number of bytes."""
    model = parse_config({"model": {"preset": preset}, "train": {"steps": 1}}).model
    assert isinstance(model, TransformerFamily)
    ours = SequentialModel(model.layer_specs(), seed=None).logical_tensors()
    dtype = getattr(torch, DTYPES[preset])
    planned = {
        name: part.detach().to(dtype)
        for rename in model.hf_renames()
        for name, part in theirs_of(rename, ours[rename.ours]).items()
    }

    def read(name: str) -> torch.Tensor:
        shape = planned[name].shape
        # As trained models have them: norms near one, matrices near zero.
        return (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02).to(dtype)

    folder.mkdir(parents=True)
    write_shards(folder, planned, read=read, shard_bytes=5 * 10**9)
    (folder / "config.json").write_text(json.dumps(model.hf_config(end_token_id=0, dtype=DTYPES[preset])))
    return sum(tensor.nbytes for tensor in planned.values())


def drop_from_cache(folder: Path) -> None:
    """Let the disk be read, and not the memory, when the files of a folder are read next."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_s(source: Path, target: Path) -> float:
    """Seconds of a copy of the weights of a folder, until they are on the disk."""
    drop_from_cache(source)
    target.mkdir()
    began_s = time.perf_counter()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - began_s
    shutil.rmtree(target)
    return seconds


def run_child(source: Path, target: Path, **parts: Any) -> dict[str, float]:
    """Run one import or export in a process of its own, and return what it measured."""
    drop_from_cache(source)
    command = [sys.executable, "-c", CHILD.format(**parts), str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{parts['function']} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def same_bytes(one: Path, other: Path) -> bool:
    """True if two folders hold the same tensors, bit for bit."""
    first, second = SafetensorsFolder(one), SafetensorsFolder(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def measure(folder: Path, preset: str, num_rounds: int) -> dict[str, Any]:
    """Medians of a copy, an import and an export, and the highest peaks of memory, in turns."""
    source = folder / "model"
    num_bytes = write_model(source, preset)
    importing = {"module": "import_model", "write": "write_tensors"}
    exporting = {"module": "export", "write": "write_shards"}
    seconds: dict[str, list[float]] = {"copy": [], "import": [], "export": []}
    found: dict[str, Any] = {"num_bytes": num_bytes, "round_trip": True, "above_bytes": {}, "before_bytes": {}}
    for _ in range(num_rounds):
        seconds["copy"].append(copy_s(source, folder / "copy"))
        imported = run_child(source, folder / "run", function="import_model", options="{}", **importing)
        options = f"dict(dtype={DTYPES[preset]!r})"
        exported = run_child(folder / "run", folder / "out", function="export_checkpoint", options=options, **exporting)
        for name, one in (("import", imported), ("export", exported)):
            seconds[name].append(one["written_s"])
            above = one["peak_bytes"] - one["before_bytes"]
            found["above_bytes"][name] = max(above, found["above_bytes"].get(name, 0))
            found["before_bytes"][name] = one["before_bytes"]
        found["proof_s"] = exported["whole_s"] - exported["written_s"]
        found["round_trip"] &= same_bytes(source, folder / "out")
        shutil.rmtree(folder / "run")
        shutil.rmtree(folder / "out")
    shutil.rmtree(source)
    return {**found, "seconds": {name: statistics.median(values) for name, values in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*DTYPES], default=[*DTYPES], help="presets; both unless given")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each; %(default)s")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the models are written; %(default)s")
    parser.add_argument("--json", type=Path, default=Path("transfer.json"), metavar="PATH", help="%(default)s")
    arguments = parser.parse_args()
    table = Table("", "memory", "limit", "speed over a copy", "limit", "met")
    report: dict[str, Any] = {}
    is_met = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for preset in arguments.models:
            found = report[preset] = measure(Path(temporary), preset, arguments.rounds)
            copied_s = found["seconds"]["copy"]
            for name in ("import", "export"):
                above_gb, speed = found["above_bytes"][name] / 1e9, copied_s / found["seconds"][name]
                met = above_gb <= MEMORY_LIMIT_GB and speed >= LEAST_SPEED and found["round_trip"]
                is_met.append(met)
                rate = f"{speed:.2f} ({found['num_bytes'] / 1e6 / found['seconds'][name]:,.0f} MB/s)"
                limits = (f"{MEMORY_LIMIT_GB} GB", f"{LEAST_SPEED}")
                table.add_row(
                    f"{preset}, {name}", f"{above_gb:.2f} GB", limits[0], rate, limits[1], "yes" if met else "NO"
                )
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{arguments.json} has the figures")
    sys.exit(0 if all(is_met) else 1)


if __name__ == "__main__":
    main()
