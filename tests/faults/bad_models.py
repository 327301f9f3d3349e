"""Bad checkpoints, and bad models of others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.cases import CHECKPOINT, Case, replace

IMPORTED = ("train", "c.yaml", "model={family: auto, init_from: llama}", "train.sequence_length=16")


# Settings of adapters, and what the message must say.
LORA: dict[str, str] = {
    "lora={rank: 4, targets: [nothing]}": "'nothing' matches none",
    "lora={rank: 4, targets: []}": "lora.targets",
    "lora={rank: 0}": "lora.rank=0",
    "lora={rank: 4, alpha: 0}": "lora.alpha=0",
    "lora={rank: 4, base: nowhere}": "nowhere",
    "lora={rank: 4, init_from: nowhere}": "nowhere",
}


def cases() -> Iterator[Case]:
    """Every bad checkpoint, model and adapter."""
    yield Case("adapters: no base", ("train", "c.yaml", "lora.rank=4"), "which weights the adapters are added to")
    for text, says in LORA.items():
        yield Case(f"adapters: {text}", (*IMPORTED, text), says)
    yield from _checkpoints()
    yield from _models()


def damage(
    name: str, edit: Callable[[Path], Any], says: str, *, command: tuple[str, ...] = ("export", "runs/done", "out")
) -> Case:
    return Case(f"checkpoint: {name}", command, says, change=lambda folder: edit(folder / CHECKPOINT))


def _checkpoints() -> Iterator[Case]:
    weights, manifest = "weights-0000.safetensors", "manifest.json"
    yield damage("no manifest", lambda c: (c / manifest).unlink(), "holds no checkpoint")
    yield damage("empty manifest", lambda c: (c / manifest).write_text(""), "manifest.json")
    yield damage("deep manifest", lambda c: (c / manifest).write_text("[" * 100_000), "manifest.json")
    yield damage("manifest of a list", lambda c: (c / manifest).write_text("[]"), "manifest.json")
    yield damage("cut weights", lambda c: os.truncate(c / weights, 1000), weights)
    yield damage("no weights", lambda c: (c / weights).unlink(), weights)
    yield damage("flipped weights", lambda c: _flip(c / weights, -9), weights)
    yield damage("flipped configuration", lambda c: _flip(c / "config.yaml", 30), "config.yaml")
    yield damage("weights that are a pipe", lambda c: replace(c / weights, os.mkfifo), weights)
    yield damage("manifest that is a pipe", lambda c: replace(c / manifest, os.mkfifo), "holds no checkpoint")
    yield damage(
        "weights that are a link", lambda c: replace(c / weights, lambda p: p.symlink_to("/dev/zero")), weights
    )
    yield damage(
        "manifest that is a link",
        lambda c: replace(c / manifest, lambda p: p.symlink_to("/dev/zero")),
        "holds no checkpoint",
    )
    yield damage("latest that leads away", lambda c: (c.parent / "latest").write_text("../../../llama\n"), "latest")
    yield damage("latest of control characters", lambda c: (c.parent / "latest").write_text("\x1b[31m\n"), "latest")
    yield damage("latest that is a pipe", lambda c: replace(c.parent / "latest", os.mkfifo), "latest")
    resume = ("train", "c.yaml", f"checkpoint.resume={CHECKPOINT}")
    yield damage("of another model", lambda c: None, "is of another configuration", command=resume)
    yield damage("no weights to go on from", lambda c: (c / weights).unlink(), CHECKPOINT, command=resume)
    sample = ("generate", "runs/done", "--config", "c.yaml")
    yield damage("described as another", lambda c: None, "model.vocab_size=auto", command=sample)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _models() -> Iterator[Case]:
    def edit(**changes: Any) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            path = folder / "llama/config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return change

    changes: dict[str, Callable[[Path], Any]] = {
        "of another family": edit(model_type="abacus"),
        "without a size": edit(hidden_size=None),
        "of a huge width": edit(hidden_size=4_000_000_000),
        "of many layers": edit(num_hidden_layers=1_000_000_000),
        "of words": edit(num_attention_heads="four"),
        "of another function": edit(hidden_act="abacus"),
        "that is deep": lambda folder: (folder / "llama/config.json").write_text("[" * 100_000),
        "that is cut": lambda folder: os.truncate(folder / "llama/config.json", 40),
        "that is a list": lambda folder: (folder / "llama/config.json").write_text("[]"),
        "that is a pipe": lambda folder: replace(folder / "llama/config.json", os.mkfifo),
        "without weights": lambda folder: (folder / "llama/model.safetensors").unlink(),
        "of cut weights": lambda folder: os.truncate(folder / "llama/model.safetensors", 3000),
        "of pickles": lambda folder: (folder / "llama/model.safetensors").rename(folder / "llama/pytorch_model.bin"),
        "that is not there": lambda folder: shutil.rmtree(folder / "llama"),
    }
    for name, change in changes.items():
        yield Case(f"model {name}", IMPORTED, "llama", change=change)
