"""Bad input of every kind, as cases: the files that it is made of, the command, and what its message must say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
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


# Changes of a sound configuration on the command line, and what the message must say.
OVERRIDES: dict[str, str] = {
    # Misspelt, of the wrong type, or out of range.
    "train.setps=3": "did you mean 'train.steps'",
    "trian.steps=3": "did you mean 'train'",
    "train.steps=ten": "whole number",
    "train.steps=0": "train.steps=0",
    "train.steps=-1": "train.steps=-1",
    "train.steps=1.5": "whole number",
    "train.steps=null": "train.steps=null",
    "train.steps=true": "whole number",
    "train.steps=[1]": "whole number",
    "train.steps={a: 1}": "whole number",
    "train.steps": "section.key=value",
    "=3": "section.key=value",
    "train.steps=": "train.steps=null",
    "train=3": "must be a mapping",
    "train.steps=[": "not valid YAML",
    "train.steps=.nan": "whole number",
    "optimizer.lr=.nan": "a number",
    "optimizer.lr=.inf": "a number",
    "optimizer.lr=-1": "greater than 0",
    "optimizer.lr=fast": "a number",
    "optimizer.betas=[0.9]": "optimizer.betas",
    "optimizer.betas=[0.9, 1]": "optimizer.betas",
    "optimizer.betas=[-1, 0.9]": "optimizer.betas",
    "optimizer.type=adamx": "did you mean adam",
    "optimizer.momentum=0.9": "only for optimizer.type=sgd",
    "scheduler.type=cosinus": "did you mean cosine",
    "scheduler.warmup_steps=-1": "scheduler.warmup_steps",
    "scheduler.min_lr_ratio=2": "scheduler.min_lr_ratio",
    "model.num_heads=5": "does not divide model.hidden_size",
    "model.num_heads=0": "model.num_heads=0",
    "model.dropout=1": "model.dropout",
    "model.dropout=-0.1": "model.dropout",
    "model.preset=huge": "model.preset=huge",
    "model.family=gtp2": "did you mean gpt2",
    "model.family=auto": "needs the folder",
    "model.init_from=nowhere": "nowhere",
    "model.vocab_size=280": "smaller than the tokenizer's 300",
    "model=tiny": "must be a mapping",
    "model=7": "model=7",
    "parallel.pp=0": "parallel.pp=0",
    "parallel.pp=9": "try parallel.pp=8",
    "parallel.tp=3": "parallel.tp=3",
    "parallel.zero=4": "parallel.zero=4",
    "parallel.order=[pipe, pipe, data]": "each axis once",
    "parallel.partition=evenly": "parallel.partition=evenly",
    "parallel.partition=type:(": "regular expression",
    "parallel.partition='type:'": "regular expression",
    "parallel.partition=manual": "needs parallel.boundaries",
    "parallel.boundaries=[0, 4]": "parallel.partition=manual",
    "parallel.boundaries=((((": "parallel.boundaries",
    "parallel.schedule=1f2b": "for example 1f1b",
    "parallel.schedule=no.csv": "no.csv",
    "parallel.max_in_flight=3": "only for parallel.schedule=auto",
    "parallel.memory_limit_gb=0": "parallel.memory_limit_gb",
    "parallel.offload=parameters": "parallel.zero=1",
    "parallel.stages_per_rank=2": "parallel.stages_per_rank=2",
    "train.global_batch_size=0": "train.global_batch_size=0",
    "train.micro_batch_size=3": "is not a multiple",
    "train.sequence_length=64": "longer than model.max_positions=32",
    "train.precision=fp8": "train.precision=fp8",
    "train.freeze=[nothing.*]": "train.freeze",
    "train.ema=1": "train.ema=1",
    "train.seed=-1": "train.seed=-1",
    "data.source=no.txt": "data.source='no.txt'",
    "data.source=[]": "data.source",
    "data.source=text.txt#0": "at least one document",
    "data.workers=-1": "data.workers=-1",
    "data.mixture=[]": "data.mixture=[]",
    "data.mixture=[{name: a, source: b.txt}]": "does not go with data.mixture",
    "data.mixture=[{name: a, source: b.txt, epochs: 0}]": "data.mixture.0.epochs=0",
    "data.stages=[{after_step: 1, weights: {a: 1}}]": "data.mixture, which is not given",
    "data.source=3": "data.source=3",
    "data.source=/dev/zero": "/dev/zero",
    "data.source=/dev/null": "/dev/null",
    "data.validation_fraction=1": "data.validation_fraction=1",
    "data.validation_fraction=0.99999": "training tokens",
    "data.vocab_size=10": "at least 257",
    "data.max_bytes=1": "training tokens",
    "data.tokenizer=no.json": "no.json",
    "data.tokenizer=text.txt": "not a tokenizer.json",
    "data.cache_dir=text.txt": "data.cache_dir",
    "data.cache_dir=/proc/cache": "/proc/cache",
    "checkpoint.interval=0": "checkpoint.interval=0",
    "checkpoint.resume=nowhere": "nowhere",
    "checkpoint.resume=text.txt": "text.txt",
    "checkpoint.keep=0": "checkpoint.keep=0",
    "checkpoint.best_is=best": "lowest or highest",
    "logging.interval=0": "logging.interval=0",
    "logging.wandb=maybe": "logging.wandb=maybe",
    "callbacks.early_stopping=true": "needs evaluations",
    "callbacks.loss_curve={file: ../loss.svg}": "must be a name",
    "callbacks.loss_curve={file: loss.txt}": "must be a name",
    "run.dir=text.txt": "is a file",
    "run.dir=text.txt/below": "text.txt",
    "run.dir=/proc/run": "/proc/run",
    "run.dir=''": "run.dir",
    "run.device=tpu": "run.device=tpu",
    "run.timeout_s=0": "run.timeout_s=0",
    "run.threads_per_process=0": "run.threads_per_process=0",
    "run.trial=no_such:Trial": "no module named",
    "run.trial=own:NUMBER": "pipekit.LayersTrial",
    # Paths that no file system has.
    'run.dir="a\\0b"': "run.dir",
    "run.dir=~no_such_user/x": "~no_such_user",
    f"run.dir={'a' * 300}": "run.dir",
    f"run.dir={'a/' * 3000}": "run.dir",
    'run.dir="a\\e[31mb"': "control character",
    'run.dir="a\\nb"': "control character",
    'run.dir="a\\x9bb"': "control character",
    'run.dir="a\\u202eb"': "control character",
    'data.source="a\\0b"': "data.source",
    "data.source=~no_such_user/x": "~no_such_user",
    f"data.source={'a' * 300}": "data.source",
    'data.cache_dir="a\\0b"': "data.cache_dir",
    "data.cache_dir=~no_such_user/x": "~no_such_user",
    'data.tokenizer="a\\0b"': "data.tokenizer",
    "data.tokenizer=~no_such_user/x": "~no_such_user",
    'data.text_key="a\\eb"': "control character",
    'checkpoint.resume="a\\0b"': "checkpoint.resume",
    "checkpoint.resume=~no_such_user/x": "~no_such_user",
    'model.init_from="a\\0b"': "model.init_from",
    "model.init_from=~no_such_user/x": "~no_such_user",
    'parallel.schedule="a\\0b.csv"': "parallel.schedule",
    'logging.wandb={project: "a\\eb"}': "control character",
    # Of a size that is never meant.
    "model.hidden_size=4000000000": "model.hidden_size=4000000000",
    "model.ffn_size=4000000000000": "model.ffn_size=4000000000000",
    "model.num_layers=1000000": "model.num_layers=1000000",
    "model.num_layers=1000000000": "model.num_layers=1000000000",
    "model.vocab_size=1000000000": "model.vocab_size=1000000000",
    "model.max_positions=10000000000": "model.max_positions=10000000000",
    "model.dropout=0.99999": "model.dropout=0.99999",
    "model.init_std=0": "model.init_std=0",
    "model.init_std=1e9": "model.init_std",
    "model.layer_norm_eps=1e300": "model.layer_norm_eps",
    "data.vocab_size=1000000000": "data.vocab_size=1000000000",
    "train.steps=1000000000000000000": "train.steps=1000000000000000000",
    f"train.steps={'9' * 5000}": "5,000 characters",
    f"train.steps=0x{'f' * 9000}": "9,002 characters",
    f"train.seed={'9' * 60}": "train.seed",
    "train.global_batch_size=1000000000000": "train.global_batch_size=1000000000000",
    "train.global_batch_size=40000000": "micro-batches",
    "train.micro_batch_size=1000000000": "train.micro_batch_size=1000000000",
    "train.sequence_length=1000000000000": "train.sequence_length=1000000000000",
    "train.eval_batches=1000000000000": "train.eval_batches=1000000000000",
    "train.gradient_clipping=1e-300": "train.gradient_clipping=1e-300",
    "parallel.dp=1000000": "parallel.dp=1000000",
    "parallel.dp=5000 train.global_batch_size=5000": "5,000 processes",
    "parallel.tp=1000000000": "parallel.tp=1000000000",
    "parallel.pp=1000000000": "parallel.pp=1000000000",
    "parallel.stages_per_rank=1000000000": "parallel.stages_per_rank=1000000000",
    "optimizer.lr=1e9": "optimizer.lr",
    "optimizer.lr=1e-300": "optimizer.lr=1e-300",
    "optimizer.eps=1e300": "optimizer.eps",
    "optimizer.eps=1e-300": "optimizer.eps=1e-300",
    "optimizer.weight_decay=1e9": "optimizer.weight_decay",
    "run.timeout_s=1e-9": "run.timeout_s=1e-09",
    "run.timeout_s=1e300": "run.timeout_s=1e+300",
    "run.threads_per_process=1000000000": "run.threads_per_process=1000000000",
    # DeepSpeed's own settings.
    "parallel.zero=1 deepspeed.zero_optimization.stage=2": "parallel.zero=1 is given",
    "deepspeed.zero_optimisation={}": "did you mean 'deepspeed.zero_optimization'",
    "deepspeed.zero_optimization=3": "must be a mapping",
    "deepspeed.wall_clock_breakdown=maybe": "deepspeed.wall_clock_breakdown=maybe",
    "deepspeed.wall_clock_breakdown=3": "deepspeed.wall_clock_breakdown=3",
    "deepspeed.memory_breakdown=[1]": "deepspeed.memory_breakdown",
    "deepspeed.dump_state=maybe": "deepspeed.dump_state=maybe",
    "deepspeed.zero_optimization.reduce_bucket_size=big": "deepspeed.zero_optimization.reduce_bucket_size=big",
    "deepspeed.zero_optimization.reduce_bucket_size=-1": "deepspeed.zero_optimization.reduce_bucket_size=-1",
    "deepspeed.zero_optimization.overlap_comm=maybe": "deepspeed.zero_optimization.overlap_comm=maybe",
    "deepspeed.fp16.initial_scale_power=x": "deepspeed.fp16.initial_scale_power=x",
    "deepspeed.gradient_predivide_factor=x": "deepspeed.gradient_predivide_factor=x",
    "deepspeed.communication_data_type=fp7": "deepspeed.communication_data_type=fp7",
    "deepspeed.data_types.grad_accum_dtype=fp7": "deepspeed.data_types.grad_accum_dtype=fp7",
    "deepspeed.comms_logger.enabled=maybe": "deepspeed.comms_logger.enabled=maybe",
    "deepspeed.flops_profiler.profile_step=x": "deepspeed.flops_profiler.profile_step=x",
    "deepspeed.aio.block_size=x": "deepspeed.aio.block_size=x",
    "deepspeed.timers.throughput.enabled=maybe": "deepspeed.timers.throughput.enabled=maybe",
    "deepspeed.csv_monitor.enabled=maybe": "deepspeed.csv_monitor.enabled=maybe",
    "deepspeed.prescale_gradients=maybe": "deepspeed.prescale_gradients=maybe",
    "deepspeed=3": "deepspeed=3",
    "deepspeed=no.json": "no.json: cannot be read",
    # Code of one's own that builds no model.
    "model=code:interact": "standard library",
    "model=os:abort": "standard library",
    "model=subprocess:run": "standard library",
    "model=no_such_module:build": "no module named",
    "model=own:missing": "has no 'missing'",
    "model=own:NUMBER": "must be a function",
    "model='own:'": "package.module:function",
    "model={builder: '../own:none'}": "package.module:function",
    "model={builder: 'own:none', hidden_size: 3}": "model.args.hidden_size",
    "model=own:raises": "my own bug",
    "model=own:deep": "recursion",
    "model=own:exits": "sys.exit",
    "model=own:exits_hard": "sys.exit",
    "model=own:none": "returned None",
    "model=own:text": "must return a list of LayerSpec",
    "model=own:empty": "an empty list",
    "model=own:wrong": "as layer 0",
    "model=own:class_alone": "write LayerSpec(Linear, ...)",
    "model=own:built": "it is built already",
}

# Texts of configuration files.
START = "model: {preset: tiny}\ntrain: {steps: 3}\n"
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "only a comment": ("# nothing\n", "is empty"),
    "a list": ("- 1\n- 2\n", "must be a mapping of sections"),
    "a number": ("3\n", "must be a mapping of sections"),
    "a word": ("train\n", "must be a mapping of sections"),
    "no train": ("model: {preset: tiny}\n", "train.steps"),
    "no model": ("train: {steps: 3}\n", "model: missing"),
    "latin-1": (START.encode() + b"# caf\xe9\n", "not UTF-8"),
    "utf-16": (START.encode("utf-16"), "not UTF-8"),
    "binary": (bytes(range(256)) * 4, "not UTF-8"),
    "nul": (START + "run: {dir: a\0b}\n", "control character"),
    "escape": (START + "run: {dir: a\x1b[31mb}\n", "control character"),
    "escaped escape": (START + 'run: {dir: "a\\e]0;title\\ab"}\n', "control character"),
    "control character in a key": (START + '"run\\e[2J": 3\n', "control character"),
    "control character in a list": (START + 'data: {source: ["a\\rb"]}\n', "control character"),
    "control character in args": (
        'model: {builder: "own:none", args: {a: {b: "\\e"}}}\n' + "train: {steps: 3}\n",
        "control",
    ),
    "control character in a tag": (START + "run: !\x85a b\n", "bad.yaml"),
    "tab": ("train:\n\tsteps: 3\n", "a tab"),
    "two colons": ("train: steps: 3\n", "one 'key: value' a line"),
    "two documents": (START + "---\n" + START, "a second document"),
    "given twice": (START + "train: {steps: 4}\n", "given twice"),
    "unclosed": ("model: {preset: tiny\ntrain: {steps: 3}\n", "bad.yaml:2"),
    "unclosed quote": (START + 'run: {dir: "a\n', "bad.yaml"),
    "a list as a key": (START + "? [1, 2]\n: 3\n", "should; write key: value"),
    "unknown anchor": (START + "run: *nothing\n", "nothing"),
    "alias in itself": (START + "run: &a {dir: *a}\n", "contains itself"),
    "alias bomb": (
        START
        + "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
        "aliases",
    ),
    "merge bomb": (
        START
        + "a0: &a0 {x: 1, y: 2, z: 3}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)),
        "aliases",
    ),
    "bool that is none": (START + "run: {dir: !!bool maybe}\n", "maybe"),
    "int that is none": (START + "run: {timeout_s: !!int x}\n", "x"),
    "empty int": (START + 'run: {timeout_s: !!int ""}\n', "whole number"),
    "float that is none": (START + "run: {timeout_s: !!float x}\n", "x"),
    "timestamp that is none": (START + "run: {dir: !!timestamp x}\n", "tag"),
    "a timestamp": (START + "run: {dir: !!timestamp 2020-01-01}\n", "tag"),
    "binary that is none": (START + "run: {dir: !!binary '*'}\n", "tag"),
    "python object": (START + "run: !!python/object/apply:os.system [id]\n", "tag"),
    "own tag": (START + "run: !mine {dir: a}\n", "tag"),
    "a set": (START + "run: !!set {a, b}\n", "tag"),
    "deep lists": (START + "run: " + "[" * 3000 + "]" * 3000 + "\n", "nested"),
    "deep mappings": (START + "run: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n", "nested"),
    "deep blocks": (START + "".join(" " * i + "a:\n" for i in range(400)), "nested"),
    "deep and unclosed": (START + "run: " + "[" * 50000, "nested"),
    "long hexadecimal": (START + f"run: {{timeout_s: 0x{'f' * 9000}}}\n", "9,002 characters"),
    "long octal": (START + f"run: {{timeout_s: 0o{'7' * 9000}}}\n", "9,002 characters"),
    "long decimal": (START + f"run: {{timeout_s: {'9' * 9000}}}\n", "9,000 characters"),
    "hexadecimal of no digits": (START + "run: {timeout_s: !!int 0x}\n", "0x"),
    "many unknown keys": (START + "".join(f"key_{i}: 1\n" for i in range(20_000)), "and 19,990 more"),
    "many unknown keys of a section": (
        "model: {preset: tiny}\ntrain:\n  steps: 3\n" + "".join(f"  key_{i}: 1\n" for i in range(5_000)),
        "and 4,990 more",
    ),
    "many given twice": (START + "run: {dir: a}\n" * 3000, "and 2,989 more"),
    "a long key": (START + "k" * 100_000 + ": 1\n", "bad.yaml:3"),
    "a long value": (START + f"run: {{device: {'v' * 200_000}}}\n", "run.device"),
    "a long line of keys": (START + "run: {" + ", ".join(f"k{i}: 1" for i in range(3000)) + "}\n", "unknown key"),
    "too large": (START + "# " + "x" * 3_000_000 + "\n", "bytes"),
    "keys that are numbers": (START + "3: 4\n", "unknown section"),
    "keys that are empty": (START + '"": 4\n', "unknown section"),
    "null sections": ("model:\ntrain:\n", "model: missing"),
    "sections in the wrong place": ("train: {steps: 3, hidden_size: 4}\nmodel: {preset: tiny}\n", "model.hidden_size"),
    "surrogates": (START + 'run: {dir: "a\\ud800b"}\n', "control character"),
    "json that is cut": ('{"model": {"preset": "tiny"}, "train": {"steps"', "bad.yaml"),
    "a trial that is not there": ("trial: no_such:Trial\nfit: {max_length: {batches: 3}}\n", "no module named"),
    "a trial that is no trial": ("trial: own:NUMBER\nfit: {max_length: {batches: 3}}\n", "subclass of pipekit.Trial"),
    "a trial of the standard library": (
        "trial: code:InteractiveConsole\nfit: {max_length: {batches: 3}}\n",
        "standard library",
    ),
    "a trial that is a number": ("trial: 3\nfit: {max_length: {batches: 3}}\n", "trial=3"),
    "a trial without a name": ("trial: own\nfit: {max_length: {batches: 3}}\n", "package.module:name"),
    "two units": ("trial: own:T\nfit: {max_length: {batches: 3, epochs: 1}}\n", "needs one unit"),
    "no unit": ("trial: own:T\nfit: {max_length: {}}\n", "needs one unit"),
    "processes of a trial": ("trial: own:T\nrun: {processes: 1000000}\n", "run.processes=1000000"),
    "time limit of a trial": ("trial: own:T\nrun: {timeout_s: 1e300}\n", "run.timeout_s=1e+300"),
    "hyperparameters of a trial": ("trial: own:T\nhyperparameters: 3\n", "hyperparameters=3"),
    "unknown keys of a trial": ("trial: own:T\nfits: {}\n", "did you mean 'fit'"),
}


def jsonl(*lines: bytes) -> bytes:
    return b'{"text": "one good line of text"}\n' + b"\n".join(lines) + b"\n"


# Files of text, and what the message must say.
DATA: dict[str, tuple[str, bytes, str]] = {
    "empty text": ("a.txt", b"", "a.txt"),
    "spaces alone": ("a.txt", b"   \n \n", "training tokens"),
    "short text": ("a.txt", b"word\n", "training tokens"),
    "byte order mark alone": ("a.txt", b"\xef\xbb\xbf", "holds no text"),
    "latin-1": ("a.txt", GOOD_LINES.encode() + b"a caf\xe9\n" + GOOD_LINES.encode(), "line 2001, column 6"),
    "utf-16": ("a.txt", "text\n".encode("utf-16"), "iconv -f utf-16"),
    "cut utf-8": ("a.txt", GOOD_LINES.encode() + "é".encode()[:1], "line 2001, column 1"),
    "overlong utf-8": ("a.txt", b"\xc0\xaf" * 100, "line 1, column 1"),
    "surrogates in utf-8": ("a.txt", b"ab\xed\xa0\x80" * 100, "line 1, column 3"),
    "random bytes": ("a.txt", bytes(i * i % 251 for i in range(5000)), "neither UTF-8 text nor"),
    "empty jsonl": ("a.jsonl", b"", "a.jsonl"),
    "blank jsonl": ("a.jsonl", b"\n\n\n", "holds no text"),
    "jsonl of lists": ("a.jsonl", jsonl(b"[1]"), "a.jsonl:2"),
    "jsonl of numbers": ("a.jsonl", jsonl(b"1"), "a.jsonl:2"),
    "jsonl without the key": ("a.jsonl", jsonl(b'{"content": "a"}'), "data.text_key"),
    "jsonl of another type": ("a.jsonl", jsonl(b'{"text": 3}'), "not a string"),
    "jsonl of null": ("a.jsonl", jsonl(b'{"text": null}'), "not a string"),
    "jsonl that is cut": ("a.jsonl", jsonl(b'{"text": "a'), "a.jsonl:2"),
    "jsonl of latin-1": ("a.jsonl", jsonl(b'{"text": "caf\xe9"}'), "a.jsonl:2"),
    "jsonl with control characters": ("a.jsonl", jsonl(b'{"text": "\x1b[31m"}'), "a.jsonl:2"),
    "jsonl with keys of control characters": ("a.jsonl", jsonl(b'{"\\u001b[31m": "a"}'), "a.jsonl:2"),
    "jsonl of deep lists": ("a.jsonl", jsonl(b"[" * 100_000 + b"]" * 100_000), "a.jsonl:2"),
    "jsonl of deep mappings": ("a.jsonl", jsonl(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "a.jsonl:2"),
    "jsonl of deep values": ("a.jsonl", jsonl(b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "a.jsonl:2"),
    "jsonl of long numbers": ("a.jsonl", jsonl(b'{"text": ' + b"9" * 9000 + b"}"), "a.jsonl:2"),
    "jsonl of nan": ("a.jsonl", jsonl(b'{"text": NaN}'), "a.jsonl:2"),
    "jsonl with a long key": ("a.jsonl", jsonl(b'{"' + b"k" * 100_000 + b'": "a"}'), "a.jsonl:2"),
    "jsonl with many keys": (
        "a.jsonl",
        jsonl(json.dumps({f"k{i}": i for i in range(20_000)}).encode()),
        "a.jsonl:2",
    ),
}


def link(name: str, target: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).symlink_to(target)


def fifo(name: str) -> Callable[[Path], Any]:
    return lambda folder: os.mkfifo(folder / name)


# Paths of text that are no files, what is made there, and what the message must say.
DATA_PLACES: dict[str, tuple[str, Callable[[Path], Any] | None, str]] = {
    "a pipe": ("a.txt", fifo("a.txt"), "a.txt"),
    "a link to a device": ("a.txt", link("a.txt", "/dev/zero"), "a.txt"),
    "a link to itself": ("a.txt", link("a.txt", "a.txt"), "a.txt"),
    "a link to nothing": ("a.txt", link("a.txt", "nothing"), "a.txt"),
    "a file without a size": ("/proc/cpuinfo", None, "/proc/cpuinfo"),
    "an empty folder": ("empty", lambda folder: (folder / "empty").mkdir(), "holds no"),
    "a folder of pictures": ("llama", None, "holds no .txt"),
    "a file that may not be read": ("/proc/self/mem", None, "/proc/self/mem"),
}


def tokenizer(**changes: Any) -> str:
    """A sound `tokenizer.json` with some keys changed; the keys of a nested one are joined by `__`."""
    stored = json.loads(small_tokenizer().to_str())
    for name, value in changes.items():
        *above, last = name.split("__")
        node = stored
        for key in above:
            node = node[key]
        node[last] = value
    return json.dumps(stored)


def word_level(vocab: dict[str, int], unknown: str) -> str:
    return tokenizer(model={"type": "WordLevel", "vocab": vocab, "unk_token": unknown})


ADDED = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZERS: dict[str, tuple[Callable[[], str | bytes], str]] = {
    "empty": (lambda: "", "tokenizer"),
    "a list": (lambda: "[]", "tokenizer"),
    "a number": (lambda: "3", "tokenizer"),
    "cut": (lambda: tokenizer()[:500], "tokenizer"),
    "latin-1": (lambda: b'{"a": "\xe9"}', "tokenizer"),
    "deep": (lambda: "[" * 100_000, "tokenizer"),
    "no model": (lambda: tokenizer(model=None), "tokenizer"),
    "unknown model": (lambda: tokenizer(model={"type": "None"}), "tokenizer"),
    "no end token": (lambda: tokenizer(added_tokens=[], model__vocab={"a": 0}, model__merges=[]), "ends a document"),
    "words without the unknown token": (lambda: word_level({"a": 0, "<|endoftext|>": 1}, "[UNK]"), "[UNK]"),
    "an id of four billion": (
        lambda: word_level({"<|endoftext|>": 0, "line": 4_000_000_000, "u": 1}, "u"),
        "4000000000",
    ),
    "an id of two billion": (
        lambda: word_level({"<|endoftext|>": 0, "line": 2_000_000_000, "u": 1}, "u"),
        "2000000000",
    ),
    "a negative id": (lambda: word_level({"<|endoftext|>": 0, "line": -1}, "line"), "tokenizer"),
    "merges of nothing": (lambda: tokenizer(model__merges=["x y"]), "tokenizer"),
    "control characters": (lambda: tokenizer(version="\x1b[31m"), "tokenizer"),
}

TABLES: dict[str, tuple[str, str]] = {
    "empty": ("", "holds no action"),
    "words": ("hello,world\n", "column 1"),
    "control characters": ("\x1b[31m\n", "column 1"),
    "a table of other ranks": ("0F0,0B0\n1F0,1B0\n1F0,1B0\n", "t.csv"),
    "a backward too early": ("0B0,0F0\n", "t.csv"),
    "a huge micro-batch": ("0F99999999999,0B99999999999\n", "t.csv"),
    "a huge stage": ("99999999999F0,99999999999B0\n", "t.csv"),
    "too large": ("0F0,0B0\n" + "# comment\n" * 2_000_000, "bytes"),
    "a long cell": ("x" * 200_000 + "\n", "t.csv"),
}

HOSTFILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "names no host"),
    "comments alone": ("# worker-1 slots=4\n", "names no host"),
    "a name alone": ("worker-1\n", "line 1"),
    "slots in words": ("worker-1 slots=four\n", "line 1"),
    "no slots": ("worker-1 slots=0\n", "slots=0"),
    "many slots": ("worker-1 slots=99999\n", "slots=99999"),
    "a host twice": ("worker-1 slots=1\nworker-1 slots=2\n", "line 2"),
    "an option of ssh": ("-oProxyCommand=id slots=1\n", "line 1"),
    "a command": ("$(id) slots=1\n", "line 1"),
    "a user": ("root@worker-1 slots=1\n", "line 1"),
    "control characters": ("a\x1b[31m slots=1\n", "line 1"),
    "latin-1": (b"caf\xe9 slots=1\n", "not UTF-8"),
    "too large": ("# x\n" * 400_000, "bytes"),
    "a long line": ("x" * 200_000 + "\n", "line 1"),
}

COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "no such command": (("trian", "c.yaml"), "trian"),
    "no configuration": (("train",), "config"),
    "a configuration that is not there": (("train", "cc.yaml"), "did you mean 'c.yaml'"),
    "a folder as a configuration": (("train", "llama"), "is a folder"),
    "a device as a configuration": (("train", "/dev/zero"), "/dev/zero"),
    "nothing as a configuration": (("train", "/dev/null"), "/dev/null"),
    "unknown option": (("train", "c.yaml", "--steps", "3"), "--steps"),
    "a path with control characters": (("train", "a\x1b[31m.yaml"), "no such file"),
    "a path that is too long": (("train", "a" * 300), "File name too long"),
    "no devices": (("plan", "c.yaml", "--devices", "0"), "--devices"),
    "too many devices": (("plan", "c.yaml", "--devices", "1000000000"), "--devices"),
    "an unknown device": (("plan", "c.yaml", "--device", "abacus"), "abacus"),
    "devices of a file that is not there": (("plan", "c.yaml", "--device-file", "no.yaml"), "no.yaml"),
    "devices of a file of text": (("plan", "c.yaml", "--device-file", "text.txt"), "text.txt"),
    "tensor parallelism alone": (("plan", "c.yaml", "--max-tp", "2"), "--devices"),
    "a page that cannot be written": (("plan", "c.yaml", "--html", "nowhere/page.html"), "--html"),
    "an unknown schedule": (("schedule", "1f2b"), "1f2b"),
    "costs in words": (("schedule", "1f1b", "--costs", "a,b,c"), "--costs"),
    "two costs": (("schedule", "1f1b", "--costs", "1,2"), "--costs"),
    "costs that are no numbers": (("schedule", "1f1b", "--costs", "nan,nan,nan"), "--costs"),
    "endless costs": (("schedule", "1f1b", "--costs", "1e400,1,1"), "--costs"),
    "costs below zero": (("schedule", "1f1b", "--costs=-1,1,1"), "--costs"),
    "many ranks of a schedule": (("schedule", "1f1b", "--pp", "1000000"), "--pp"),
    "many micro-batches of a schedule": (("schedule", "1f1b", "--micro-batches", "1000000000"), "--micro-batches"),
    "an export of nothing": (("export", "nowhere", "out"), "no such folder"),
    "an export of a file": (("export", "text.txt", "out"), "text.txt"),
    "an export without a checkpoint": (("export", "llama", "out"), "llama"),
    "an export onto other things": (("export", "runs/done", "llama"), "llama"),
    "an export of no size": (("export", "runs/done", "out", "--shard-size", "big"), "shard_size=big"),
    "an export of shards of nothing": (("export", "runs/done", "out", "--shard-size", "0"), "shard_size=0"),
    "an export below a file": (("export", "runs/done", "text.txt/out"), "text.txt"),
    "text of nothing": (("generate", "nowhere"), "no such folder"),
    "text at a negative temperature": (("generate", "runs/done", "--temperature", "-1"), "--temperature"),
    "text of no tokens": (("generate", "runs/done", "--max-new-tokens", "0"), "--max-new-tokens"),
    "checkpoints of nothing": (("checkpoints", "nowhere"), "nowhere"),
    "checkpoints to prune": (("checkpoints", "prune", "runs/done"), "--keep"),
    "an unknown word for checkpoints": (("checkpoints", "burn", "runs/done"), "average, ema, prune or gather"),
    "a difference to nothing": (("checkpoints", "runs/done", "--diff", "5", "6"), "6"),
    "an import of nothing": (("import", "nowhere", "out"), "nowhere"),
    "a migration of nothing": (("migrate", "nowhere", "out"), "nowhere"),
    "a script that is not there": (("launch", "no.py"), "no.py"),
    "a script of many processes": (("launch", "-n", "1000000", "own.py"), "1,000,000 processes"),
    "layouts in words": (("verify", "c.yaml", "--layouts", "wide"), "wide"),
    "a tolerance below zero": (("verify", "c.yaml", "--tolerance", "-1"), "--tolerance"),
}


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
    yield damage("weights that are a pipe", lambda c: _replace(c / weights, os.mkfifo), weights)
    yield damage("manifest that is a pipe", lambda c: _replace(c / manifest, os.mkfifo), "holds no checkpoint")
    yield damage(
        "weights that are a link", lambda c: _replace(c / weights, lambda p: p.symlink_to("/dev/zero")), weights
    )
    yield damage(
        "manifest that is a link",
        lambda c: _replace(c / manifest, lambda p: p.symlink_to("/dev/zero")),
        "holds no checkpoint",
    )
    yield damage("latest that leads away", lambda c: (c.parent / "latest").write_text("../../../llama\n"), "latest")
    yield damage("latest of control characters", lambda c: (c.parent / "latest").write_text("\x1b[31m\n"), "latest")
    yield damage("latest that is a pipe", lambda c: _replace(c.parent / "latest", os.mkfifo), "latest")
    resume = ("train", "c.yaml", f"checkpoint.resume={CHECKPOINT}")
    yield damage("of another model", lambda c: None, "is of another configuration", command=resume)
    yield damage("no weights to go on from", lambda c: (c / weights).unlink(), CHECKPOINT, command=resume)
    sample = ("generate", "runs/done", "--config", "c.yaml")
    yield damage("described as another", lambda c: None, "model.vocab_size=auto", command=sample)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink(missing_ok=True)
    make(path)


def _models() -> Iterator[Case]:
    def edit(**changes: Any) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            path = folder / "llama/config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return change

    command = ("train", "c.yaml", "model={family: auto, init_from: llama}", "train.sequence_length=16")
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
        "that is a pipe": lambda folder: _replace(folder / "llama/config.json", os.mkfifo),
        "without weights": lambda folder: (folder / "llama/model.safetensors").unlink(),
        "of cut weights": lambda folder: os.truncate(folder / "llama/model.safetensors", 3000),
        "of pickles": lambda folder: (folder / "llama/model.safetensors").rename(folder / "llama/pytorch_model.bin"),
        "that is not there": lambda folder: shutil.rmtree(folder / "llama"),
    }
    for name, change in changes.items():
        yield Case(f"model {name}", command, "llama", change=change)


def _words(text: str) -> list[str]:
    """A change, or two that only together are wrong."""
    return text.split() if text.count("=") == 2 and text.count(" ") == 1 else [text]


def _cases() -> Iterator[Case]:
    for text, says in OVERRIDES.items():
        yield Case(f"override: {text[:60]!r} of {len(text)}", ("train", "c.yaml", *_words(text)), says)
    for name, (content, says) in TEXTS.items():
        yield Case(f"configuration: {name}", ("train", "bad.yaml"), says, {"bad.yaml": content})
    for name, (file, bytes_, says) in DATA.items():
        yield Case(f"data: {name}", ("train", "c.yaml", f"data.source={file}"), says, {file: bytes_})
    for name, (place, change, says) in DATA_PLACES.items():
        yield Case(f"data: {name}", ("train", "c.yaml", f"data.source={place}"), says, change=change)
    for name, (make, says) in TOKENIZERS.items():
        yield Case(
            f"tokenizer: {name}",
            ("train", "c.yaml", "data.tokenizer=t/tokenizer.json"),
            says,
            {"t/tokenizer.json": make()},
        )
    for name, (table, says) in TABLES.items():
        yield Case(
            f"schedule: {name}", ("train", "c.yaml", "parallel.schedule=t.csv", "parallel.pp=2"), says, {"t.csv": table}
        )
    for name, make in {"a pipe": fifo("t.csv"), "a device": link("t.csv", "/dev/zero")}.items():
        yield Case(f"schedule: {name}", ("train", "c.yaml", "parallel.schedule=t.csv"), "t.csv", change=make)
    for name, (content, says) in HOSTFILES.items():
        command = ("launch", "--hostfile", "hosts", "train", "c.yaml")
        yield Case(f"hostfile: {name}", command, says, {"hosts": content})
    for name, (command, says) in COMMANDS.items():
        yield Case(f"command: {name}", command, says)
    for command in ("train", "plan", "verify"):
        for text in ("model: own:exits", "model: {builder: own:exits}", "model: {preset: tiny}\nrun: {trial: own:T}"):
            stored = {"runs/done/config.yaml": f"{text}\ntrain: {{steps: 3}}\n"}
            name = f"trust: {command} of {text[:30]!r}"
            yield Case(name, (command, "runs/done/config.yaml"), "add --trust-code", stored)
    stored = {"runs/done/config.yaml": "trial: own:T\n"}
    yield Case("trust: train of a trial", ("train", "runs/done/config.yaml"), "add --trust-code", stored)
    yield Case("command: a pipe as a configuration", ("train", "a.yaml"), "a.yaml", change=fifo("a.yaml"))
    yield from _checkpoints()
    yield from _models()


CASES = tuple(_cases())
