"""Bad command lines, and the files that commands read: tables of schedules, hostfiles, code of unknown origin."""

from __future__ import annotations

from collections.abc import Iterator

from faults.cases import Case, fifo, link

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
    "text of a wide nucleus": (("generate", "runs/done", "--top-p", "2"), "top_p=2"),
    "text before nothing": (("generate", "runs/done", "--stop", ""), "--stop"),
    "text of a file that is not there": (("generate", "runs/done", "--prompts", "no.jsonl"), "no.jsonl"),
    "text of a device": (("generate", "runs/done", "--prompts", "/dev/zero"), "/dev/zero"),
    "an evaluation of nothing": (("eval", "nowhere"), "nowhere"),
    "an evaluation with other steps": (("eval", "runs/done", "train.steps=3"), "only the data can be another"),
    "an evaluation on a text that is not there": (("eval", "runs/done", "data.source=no.txt"), "no.txt"),
    "an evaluation of another tokenizer": (("eval", "runs/done", "data.tokenizer=t.json"), "has its own tokenizer"),
    "an evaluation of a model without text": (("eval", "llama"), "llama"),
    "data of nothing": (("data", "prepare", "no.txt"), "no.txt"),
    "data to do something else with": (("data", "burn", "text.txt"), "burn"),
    "data as a table": (("data", "convert", "text.txt", "out.csv"), "out.csv"),
    "data onto a file": (("data", "convert", "text.txt", "own.jsonl"), "own.jsonl"),
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


# Files of prompts, and what the message must say.
PROMPTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "holds no prompt"),
    "latin-1": (b"caf\xe9\n", "not UTF-8"),
    "cut": ('{"prompt": "a"}\n{"prompt": "b', "p.jsonl:2"),
    "deep": ('{"prompt": "a"}\n' + "[" * 100_000, "p.jsonl:2"),
    "neither text nor messages": ('{"text": "a"}\n', "neither prompt nor messages"),
    "half of a character": ('{"prompt": "\\ud800"}\n', "surrogate pair"),
    "messages of a model without a template": ('{"messages": [{"role": "user", "content": "a"}]}\n', "chat template"),
}


def cases() -> Iterator[Case]:
    """Every bad command line."""
    for name, (content, says) in PROMPTS.items():
        yield Case(f"prompts: {name}", ("generate", "runs/done", "--prompts", "p.jsonl"), says, {"p.jsonl": content})
    for name, (table, says) in TABLES.items():
        command = ("train", "c.yaml", "parallel.schedule=t.csv", "parallel.pp=2")
        yield Case(f"schedule: {name}", command, says, {"t.csv": table})
    for name, make in {"a pipe": fifo("t.csv"), "a device": link("t.csv", "/dev/zero")}.items():
        yield Case(f"schedule: {name}", ("train", "c.yaml", "parallel.schedule=t.csv"), "t.csv", change=make)
    for name, (content, says) in HOSTFILES.items():
        yield Case(f"hostfile: {name}", ("launch", "--hostfile", "hosts", "train", "c.yaml"), says, {"hosts": content})
    for name, (command, says) in COMMANDS.items():
        yield Case(f"command: {name}", command, says)
    for verb in ("train", "plan", "verify"):
        for text in ("model: own:exits", "model: {builder: own:exits}", "model: {preset: tiny}\nrun: {trial: own:T}"):
            stored = {"runs/done/config.yaml": f"{text}\ntrain: {{steps: 3}}\n"}
            yield Case(f"trust: {verb} of {text[:30]!r}", (verb, "runs/done/config.yaml"), "add --trust-code", stored)
    stored = {"runs/done/config.yaml": "trial: own:T\n"}
    yield Case("trust: train of a trial", ("train", "runs/done/config.yaml"), "add --trust-code", stored)
