"""Checkpoints that do not tell their model, as a training loop of one's own leaves them, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hand_made import TEXT, random_model, small_tokenizer, write_checkpoint
from pipekit.cli import app
from pipekit.config import parse_config
from pipekit.errors import CheckpointError, ConfigError, PipekitError
from pipekit.inference.export import export_checkpoint
from pipekit.inference.generator import Generator
from pipekit.inference.load_model import initial_seed, load_model
from pipekit.plan.plan import StartPoint
from pipekit.plan.run_folder import find_start

MODEL = {"vocab_size": 301, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48, "max_positions": 24}
UNDESCRIBED = yaml.safe_dump({"layers": [{"name": "embed"}], "deepspeed": {"train_batch_size": 8}})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a script, which has its layers and its settings for DeepSpeed, and no tokenizer."""
    return write_checkpoint(tmp_path / "run", *random_model(), script=UNDESCRIBED, tokenizer=None)


def write_yaml(tmp_path: Path, model: object = MODEL, **sections: object) -> Path:
    file = tmp_path / "described.yaml"
    file.write_text(yaml.safe_dump({"model": model, **sections}))
    return file


def test_without_a_description_its_model_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    for read in (lambda: export_checkpoint(checkpoint, tmp_path / "out"), lambda: load_model(checkpoint)):
        with pytest.raises(CheckpointError, match=r"does not tell its model, .*add --config FILE\.yaml; .*--raw"):
            read()


def test_with_one_beside_it_transformers_computes_the_same(checkpoint: Path, tmp_path: Path) -> None:
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    file = write_yaml(tmp_path, data={"tokenizer": str(tmp_path / "tokenizer.json")})
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--config", str(file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), random_model()[1]
    stored = theirs.state_dict()
    assert torch.equal(stored["transformer.h.1.mlp.c_fc.weight"], ours["blocks.1.mlp.expand.weight"].t())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    generator = Generator.open(tmp_path / "run", config=file, device="cpu")
    (ours_of_file,) = generator.generate([generator.encode_prompt("def")], max_new_tokens=8)
    ids = theirs.generate(**tokenizer("def", return_tensors="pt"), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert ours_of_file.token_ids == ids[0, -8:].tolist()


def test_what_the_checkpoint_says_of_its_model_is_enough(tmp_path: Path) -> None:
    config, tensors = random_model()
    script = UNDESCRIBED + yaml.safe_dump({"model": MODEL, "train": {"steps": 1, "sequence_length": 24}})
    checkpoint = write_checkpoint(tmp_path / "run", config, tensors, script=script)
    assert export_checkpoint(checkpoint, tmp_path / "out").max_logit_difference <= 1e-5
    # A run that branches off it has to have its model, and brings its own data.
    values = {"model": MODEL, "train": {"steps": 9, "sequence_length": 16}, "data": {"source": "my_text"}}
    values |= {"run": {"dir": str(tmp_path / "branch")}, "checkpoint": {"resume": str(checkpoint)}}
    assert find_start(parse_config(values)) == StartPoint(checkpoint, 5)
    with pytest.raises(ConfigError, match=r"model\.num_layers differs"):
        find_start(parse_config(values, ["model.num_layers=3"]))


def test_a_run_branches_off_a_checkpoint_that_does_not_tell_its_model(checkpoint: Path, tmp_path: Path) -> None:
    values = {"model": MODEL, "train": {"steps": 9, "sequence_length": 16}}
    values |= {"run": {"dir": str(tmp_path / "branch")}, "checkpoint": {"resume": str(checkpoint)}}
    assert find_start(parse_config(values)) == StartPoint(checkpoint, 5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {**MODEL, "ffn_size": 40},
            r"with blocks\.0\.mlp\.expand\.weight \(40, 32\), and in .*step-.* it is \(48, 32\)",
        ),
        ({**MODEL, "num_layers": 3}, r"with blocks\.2\.attention\.norm\.weight \(32,\), and .* does not hold it"),
        ({**MODEL, "num_layers": 1}, r"without blocks\.1\.attention\.norm\.weight \(32,\), and .* holds it"),
        ({"preset": "tiny"}, r"model\.vocab_size=auto: .*give a number"),
        ("no_such_module:build", r"train\.sequence_length: missing.*\{sequence_length: 1024\}"),
        ({**MODEL, "width": 3}, r"described\.yaml:\d+: model\.width: unknown key"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_at_its_first_tensor(
    checkpoint: Path, tmp_path: Path, model: object, message: str
) -> None:
    with pytest.raises(PipekitError, match=message) as caught:
        export_checkpoint(checkpoint, tmp_path / "out", config=write_yaml(tmp_path, model))
    assert "described.yaml" in str(caught.value) or "vocab_size" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_where_a_description_says_nothing_it_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["export", str(checkpoint), str(tmp_path / "out"), "--raw", "--config", str(write_yaml(tmp_path))]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError)
    assert "leave one of them out" in str(done.exception)
    export_checkpoint(checkpoint, tmp_path / "out", config=write_yaml(tmp_path))
    with pytest.raises(ConfigError, match="is an export, which describes its model itself"):
        Generator.open(tmp_path / "out", config=MODEL)


def test_only_layers_of_ones_own_are_built_with_the_seed_of_the_run() -> None:
    train = {"steps": 1, "seed": 77}
    # What their constructors draw beside the parameters is in no checkpoint.
    assert initial_seed(parse_config({"model": "my_model:build_layers", "train": train})) == 77
    assert initial_seed(parse_config({"model": MODEL, "train": {**train, "sequence_length": 8}})) is None
