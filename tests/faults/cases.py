"""Cases of bad input, and the working directory that they are tried in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hand_made import random_model, small_tokenizer, write_checkpoint, write_hf_folder

CHECKPOINT = "runs/done/checkpoints/step-00000005"
CONFIG: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 32},
    "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 32, "precision": "fp32"},
    "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
}
GOOD_LINES = "".join(f"line {i} of {i * i}\n" for i in range(2000))
BUILDERS = {
    "raises": "raise ValueError('my own bug')",
    "deep": "return deep(config)",
    "exits": "import sys; sys.exit(0)",
    "exits_hard": "raise SystemExit('bye')",
    "none": "return None",
    "text": "return 'layers'",
    "empty": "return []",
    "wrong": "return [1, 2]",
    "class_alone": "from torch import nn; return [nn.Linear]",
    "built": "from torch import nn; return [nn.Linear(2, 2)]",
}


@dataclass(frozen=True)
class Case:
    """A command that must be refused.

    Attributes:
        name: of the case.
        command: what follows `pipekit`.
        says: what its message must say.
        files: content of the files that it reads, by their paths in the working directory.
        change: called with the working directory in the end.
    """

    name: str
    command: tuple[str, ...]
    says: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    change: Callable[[Path], Any] | None = None

    def write(self, folder: Path) -> None:
        """Write what the case reads into a working directory."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        if self.change is not None:
            self.change(folder)


def fill_workspace(folder: Path) -> None:
    """Write a working directory in which all is well: a text, a configuration, a tokenizer, a finished run, a model."""
    (folder / "text.txt").write_text(GOOD_LINES)
    cache = folder.parent / "cache"
    (folder / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "cache_dir": str(cache)}}))
    small_tokenizer().save(str(folder / "tokenizer.json"))
    config, tensors = random_model(num_layers=1)
    write_checkpoint(folder / "runs/done", config, tensors)
    write_hf_folder(folder / "llama")
    body = "".join(f"\ndef {name}(config):\n    {text}\n" for name, text in BUILDERS.items())
    (folder / "own.py").write_text(f"def deep(config):\n    return deep(config)\n{body}\nNUMBER = 3\n")
    (folder / "own.jsonl").write_text('{"text": "of one\'s own"}\n')


def link(name: str, target: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).symlink_to(target)


def fifo(name: str) -> Callable[[Path], Any]:
    return lambda folder: os.mkfifo(folder / name)


def replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink(missing_ok=True)
    make(path)
