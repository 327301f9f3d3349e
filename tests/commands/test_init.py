"""`pipekit init`: every combination loads or is refused, its comments are the schema's, and it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from fork_server import run_pipekit
from hand_made import write_hf_folder
from pipekit.cli import app
from pipekit.config import config_json_schema, load_config
from pipekit.errors import ConfigError
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.plan.resources import Resources
from pipekit.training.prepare import initial_weights, prepare_run

SCHEMA = config_json_schema()["$defs"]


def init(path: Path, *options: str) -> None:
    done = CliRunner().invoke(app, ["init", *options, "-o", str(path)], catch_exceptions=True)
    if done.exception is not None:
        raise done.exception


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_combination_loads_or_is_refused(tmp_path: Path, zero: int, offload: str) -> None:
    path = tmp_path / "c.yaml"
    if (zero, offload) == (0, "cpu"):
        with pytest.raises(ConfigError, match=r"parallel.offload=optimizer does not go with parallel.zero=0"):
            init(path, "--zero", "0", "--offload", "cpu")
        assert not path.exists()
        return
    init(path, "--zero", str(zero), "--offload", offload)
    parallel = load_config(path).parallel
    assert parallel.zero == zero
    assert parallel.offload == {"none": "none", "cpu": "parameters" if zero == 3 else "optimizer"}[offload]


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match=r"parallel.zero=2 does not go with parallel.pp=2"):
        init(path, "--zero", "2", "--pp", "2")
    for options in (["--offload", "nvme"], ["--nvme-dir", "/nvme"]):
        with pytest.raises(ConfigError, match=r"--offload=nvme and --nvme-dir=DIR need each other"):
            init(path, *options)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="already exists; remove it, or give another name with -o"):
        init(path)
    assert path.read_text() == "mine"


def test_the_comments_are_the_descriptions_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    text = CliRunner().invoke(app, ["init"]).output
    words = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    for section, key in [("TrainConfig", "global_batch_size"), ("ParallelConfig", "zero"), ("OptimizerConfig", "lr")]:
        assert " ".join(SCHEMA[section]["properties"][key]["description"].split()) in words
    assert max(map(len, text.splitlines())) <= 103


@pytest.mark.parametrize("rank", [None, 4], ids=["weights", "adapters"])
def test_a_model_of_a_folder_is_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf_folder(tmp_path / "theirs")
    init(tmp_path / "c.yaml", "--from", "theirs", *([] if rank is None else ["--lora", str(rank)]))
    (tmp_path / "my_text").write_text("def return class import for in range print " * 3000)
    config = load_config(tmp_path / "c.yaml", ["data.cache_dir=cache", "run.device=cpu"])
    stored = json.loads((tmp_path / "theirs/config.json").read_text())
    assert (config.model.family, config.model.hidden_size) == ("llama", stored["hidden_size"])
    assert config.train.sequence_length == stored["max_position_embeddings"]
    assert (config.lora.rank, config.optimizer.lr) == ((None, 1e-4) if rank is None else (rank, 2e-4))
    # It begins with the folder's weights, and with its tokenizer.
    source = initial_weights(config)
    assert isinstance(source, HuggingFaceFolder)
    plan = prepare_run(config, Resources(world_size=1), start=None).plan
    assert Path(plan.prepared["tokenizer_path"]).read_text() == (tmp_path / "theirs/tokenizer.json").read_text()
    assert (plan.num_parameters < sum(count.numel() for count in load_file("theirs/model.safetensors").values())) == (
        rank is not None
    )


def test_a_folder_without_a_model_and_adapters_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lora=4 needs a model to adapt; add --from FOLDER"):
        init(tmp_path / "c.yaml", "--lora", "4")
    with pytest.raises(ConfigError, match=r"model.init_from"):
        init(tmp_path / "c.yaml", "--from", str(tmp_path))
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_the_configuration_trains(tmp_path: Path) -> None:
    init(tmp_path / "c.yaml", "--zero", "2", "--offload", "nvme", "--nvme-dir", "files")
    (tmp_path / "files").mkdir()
    small = ("train.steps=2", "train.sequence_length=16", "data.max_bytes=20000", "data.vocab_size=300")
    done = run_pipekit(["train", "c.yaml", "run.device=cpu", *small], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/c/metrics.jsonl").read_text().count('"loss"') >= 1
    assert list((tmp_path / "files").iterdir()) == []
