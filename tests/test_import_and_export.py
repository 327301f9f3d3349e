"""Models that come from `transformers` and go back, trained in between by `pipekit train`, in processes of its own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import default_collate
from transformers import AutoModelForCausalLM, AutoTokenizer

from fork_server import run_pipekit
from hand_made import examples_at_work
from pipekit.config import load_config
from pipekit.data.order import SampleOrder
from pipekit.data.prepare import prepare_data
from pipekit.data.samples import TokenDataset

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, SEQUENCE, LR = 3, 4, 32, 0.1
TRAIN = {"steps": STEPS, "global_batch_size": BATCH, "sequence_length": SEQUENCE, "precision": "fp32"}
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": SEQUENCE}


def pipekit(work: Path, *arguments: str) -> str:
    done = run_pipekit(arguments, cwd=work)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(run: Path, key: str) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record[key] for record in records if key in record]


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_an_exported_model_is_imported_and_trained_on_as_transformers_would(tmp_path: Path, family: str) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"word {number} of {number * number}" for number in range(3000)))
    plain = ["optimizer.type=sgd", f"optimizer.lr={LR}", "optimizer.weight_decay=0", "scheduler.type=constant"]
    data = {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"}
    train = {**TRAIN, "gradient_clipping": 0, "eval_interval": STEPS, "eval_batches": 2}
    values = {"model": {"family": family, **SIZES}, "parallel": {"pp": 2}, "train": train, "data": data}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(values))
    pipekit(tmp_path, "train", "first.yaml", *plain, "optimizer.momentum=0.9")
    pipekit(tmp_path, "export", "runs/first", "exported")
    told = pipekit(tmp_path, "import", "exported", "runs/second", "train.sequence_length=16")
    assert "train it with: pipekit train runs/second/config.yaml data.source=YOUR_TEXT\n" in told
    # Nothing has been trained there: it takes other data, another length and all the rest.
    changes = [f"train.{key}={json.dumps(value)}" for key, value in train.items()]
    changes += ["data.source=text.txt", "data.cache_dir=cache", "parallel.pp=2"]
    pipekit(tmp_path, "train", "runs/second/config.yaml", *plain, *changes)

    first, second = tmp_path / "runs/first", tmp_path / "runs/second"
    assert metrics(second, "val_loss")[0] == pytest.approx(metrics(first, "val_loss")[-1], rel=1e-5)
    assert metrics(second, "loss") == pytest.approx(losses_of_transformers(tmp_path / "exported", second), rel=1e-5)
    assert metrics(second, "loss")[-1] < metrics(first, "loss")[0] - 0.1, "the trained weights went on"


def losses_of_transformers(folder: Path, run: Path) -> list[float]:
    """Train an exported model with transformers and torch alone on the samples of a run; return its losses."""
    config = load_config(run / "config.yaml")
    relative = {name: str(run.parents[1] / getattr(config.data, name)) for name in ("source", "tokenizer", "cache_dir")}
    config = config.updated({f"data.{name}": path for name, path in relative.items()})
    dataset: Any = TokenDataset(prepare_data(config.data, sequence_length=SEQUENCE).sources[0].train, SEQUENCE)
    order = SampleOrder(len(dataset), config.train.seed, shuffle=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)  # without dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for step in range(STEPS):
        inputs, labels = default_collate([dataset[int(index)] for index in order.indices(step * BATCH, BATCH)])
        loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_public_model_goes_on_and_home_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    section = page.partition("### A public model on your own text\n")[2].partition("\n## ")[0]
    commands = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)[0].splitlines()
    example = (ROOT / "examples/continue_llama.yaml").read_text()
    assert [line.removeprefix("#   ") for line in example.splitlines()[1:4]] == commands
    download, train, export = map(shlex.split, commands)
    work = examples_at_work(tmp_path)
    assert (work / download[-1] / "config.json").is_file(), "stands in for what the first command downloads"
    pipekit(work, *train[1:], "train.steps=2", "train.eval_batches=1", "data.cache_dir=cache")
    pipekit(work, *export[1:])
    monkeypatch.chdir(work)
    scope: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[0], scope)
    assert scope["go_on"]("def function(").startswith("def function(")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # what peft says of transformers' code
def test_a_chat_model_is_fine_tuned_by_adapters_as_the_example_and_the_page_say(tmp_path: Path) -> None:
    from peft import PeftModel  # which takes seconds

    example = (ROOT / "examples/chat_llama.yaml").read_text()
    commands = [line.removeprefix("#   ") for line in example.splitlines()[1:7]]
    page = (ROOT / "docs/fine-tuning.md").read_text(encoding="utf-8")
    section = page.partition("## A chat model of your own\n")[2].partition("\n## ")[0]
    shown = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)[0].splitlines()
    told_of = [line for line in commands if "--adapter" not in line]
    assert [line for line in shown if line in commands] == told_of, "the page walks the same way"
    download, train, adapter, merge, evaluate, chat = map(shlex.split, commands)
    imported, evaluate_base = (shlex.split(line) for line in shown if line not in commands)

    work = examples_at_work(tmp_path)
    assert f"init_from: {download[-1]}" in pipekit(work, *imported[1:])
    short = ["train.steps=4", "train.sequence_length=256", "train.eval_interval=2", "train.eval_batches=1"]
    pipekit(work, *train[1:], *short, "data.cache_dir=cache", "parallel.pp=2")
    run = work / "runs/chat_llama"
    # Stopped and gone on, at another layout.
    pipekit(work, *train[1:], *short, "train.steps=6", "data.cache_dir=cache", "parallel.tp=2")
    pipekit(work, *adapter[1:])
    assert "checked against transformers" in pipekit(work, *merge[1:])
    before, after = (
        json.loads(pipekit(work, *command[1:], "data.cache_dir=cache", "--json"))["texts"][0]
        for command in (evaluate_base, evaluate)
    )
    losses = metrics(run, "val_loss")
    assert [before["loss"], after["loss"]] == pytest.approx([losses[0], losses[-1]], rel=1e-4)
    assert after["loss"] < before["loss"]

    base = AutoModelForCausalLM.from_pretrained(work / download[-1])
    tuned: Any = PeftModel.from_pretrained(base, work / adapter[3]).eval()
    merged: Any = AutoModelForCausalLM.from_pretrained(work / merge[3])
    tokenizer = AutoTokenizer.from_pretrained(work / merge[3])
    question = [{"role": "user", "content": "What does f_3 do?"}]
    tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        torch.testing.assert_close(tuned(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)
        written = tokens
        for _ in range(5):
            written = torch.cat([written, merged(written).logits[:, -1:].argmax(-1)], dim=1)
    said = run_pipekit([*chat[1:], "--temperature", "0", "--max-new-tokens", "5"], cwd=work, said="What does f_3 do?\n")
    expected = tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)
    # Bytes of a character that five tokens do not complete are not written.
    assert said.stdout == expected.rstrip("\ufffd") + "\n"
