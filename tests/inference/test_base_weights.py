"""Checkpoints of adapters together with their base: merged, exported, sampled from, and refused with another base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hand_made import random_model, write_checkpoint, write_hf_folder
from pipekit.checkpoint.manifest import resolve_checkpoint
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import Config, parse_config
from pipekit.errors import CheckpointError, ConfigError
from pipekit.inference.base_weights import base_record, open_base, with_base
from pipekit.inference.export import export_checkpoint
from pipekit.inference.load_model import load_model, open_model
from pipekit.inference.peft_adapter import AdapterFolder, export_adapter
from pipekit.layers.lora import is_adapter
from pipekit.layers.sequential import SequentialModel
from pipekit.models import adapted_layers, build_layers

TOKENS = torch.arange(20)[None] * 7 % 300


def adapters_of(config: Config) -> dict[str, Tensor]:
    torch.manual_seed(4)
    tensors = SequentialModel(adapted_layers(config, build_layers(config)), seed=None).logical_tensors()
    return {name: torch.randn(tensor.shape) * 0.3 for name, tensor in tensors.items() if is_adapter(name)}


def write_run(folder: Path, **lora: Any) -> Config:
    """Write a base in the format of `transformers`, and a run with adapters of it."""
    write_hf_folder(folder / "base", num_kv_heads=2)
    config = parse_config(
        {
            "model": {"family": "auto", "init_from": str(folder / "base")},
            "train": {"steps": 5, "sequence_length": 24},
            "lora": {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"], **lora},
        }
    )
    write_checkpoint(folder / "run", config, adapters_of(config), base=base_record(open_base(config)))
    return config


def expected_logits(config: Config, adapters: dict[str, Tensor]) -> Tensor:
    model = SequentialModel(adapted_layers(config, build_layers(config)))
    base = open_base(config)
    model.load_logical_tensors(adapters | {name: base.tensor(name) for name in base.shapes}, where="test")
    with torch.no_grad():
        return model.eval()(TOKENS)  # type: ignore[no-any-return]


def test_a_checkpoint_of_adapters_is_the_model_that_they_make(tmp_path: Path) -> None:
    config = write_run(tmp_path, rslora=True)
    expected = expected_logits(config, adapters_of(config))
    model, _, tokenizer = load_model(resolve_checkpoint(tmp_path / "run"))
    assert tokenizer is not None
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
        plain = open_model(tmp_path / "base").build()(TOKENS)
    assert float((plain - expected).abs().max()) > 0.1
    reader = CheckpointReader(resolve_checkpoint(tmp_path / "run"))
    assert all(is_adapter(name) for name in reader.shapes)
    assert with_base(reader, config).shapes == open_base(config).shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_export_is_the_same_model(tmp_path: Path, dtype: Any) -> None:
    config = write_run(tmp_path)
    check = export_checkpoint(tmp_path / "run", tmp_path / "out", merge=True, dtype=dtype)
    assert check.max_logit_difference <= check.tolerance
    expected = expected_logits(config, adapters_of(config))
    with torch.no_grad():
        found = open_model(tmp_path / "out").build()(TOKENS)
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_an_adapter_is_exported_and_read_back(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    done = export_adapter(tmp_path / "run", tmp_path / "out")
    assert (done.step, done.num_linears) == (5, 8)
    assert done.num_parameters == sum(tensor.numel() for tensor in adapters_of(config).values())
    again = config.updated({"lora.init_from": str(tmp_path / "out")})
    folder = AdapterFolder(tmp_path / "out", again, adapted_layers(again, build_layers(again)))
    for name, tensor in adapters_of(config).items():
        assert torch.equal(folder.tensor(name), tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora.rank": 8}, r"its r is 4; set lora.rank=4$"),
        ({"lora.alpha": 7.0}, r"its lora_alpha is 6; set lora.alpha=6$"),
        ({"lora.rslora": True}, r"its use_rslora is False; set lora.rslora=false$|its use_rslora is false"),
        (
            {"lora.targets": ["q_proj"]},
            r"holds an adapter of model.layers.0.mlp.down_proj, which lora.targets does not name; give the targets of",
        ),
        (
            {"lora.targets": ["*"]},
            r"holds no adapter of model.layers.0.mlp.gate_proj, which lora.targets names; give the targets of the",
        ),
    ],
)
def test_an_adapter_that_the_configuration_does_not_describe_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = write_run(tmp_path)
    export_adapter(tmp_path / "run", tmp_path / "out")
    other = config.updated(change)
    with pytest.raises(CheckpointError, match=rf"^lora.init_from={tmp_path}/out: ({message})"):
        AdapterFolder(tmp_path / "out", other, adapted_layers(other, build_layers(other)))


def test_the_base_may_have_moved_to_where_the_configuration_says(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"step-00000005: holds adapters, and their base cannot be read: .*base"):
        load_model(resolve_checkpoint(tmp_path / "run"))
    reader = CheckpointReader(resolve_checkpoint(tmp_path / "run"))
    moved = config.updated({"model.init_from": str(tmp_path / "moved")})
    assert with_base(reader, moved).shapes


def test_another_base_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its adapters were trained with other weights than those in .*/base;"):
        load_model(resolve_checkpoint(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="its adapters were trained with other weights"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_ones_own_is_a_base(tmp_path: Path) -> None:
    plain, tensors = random_model(family="gpt2")
    write_checkpoint(tmp_path / "own", plain, tensors)
    config = plain.updated({"lora.rank": 2, "lora.base": str(tmp_path / "own")})
    adapters = adapters_of(config)
    write_checkpoint(tmp_path / "run", config, adapters, base=base_record(open_base(config)))
    expected = expected_logits(config, adapters)
    export_checkpoint(tmp_path / "run", tmp_path / "out", merge=True)
    with torch.no_grad():
        torch.testing.assert_close(open_model(tmp_path / "out").build()(TOKENS), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"^lora.base=.*run: holds adapters, and not the weights that they are"):
        open_base(config.updated({"lora.base": str(tmp_path / "run")}))
    shutil.rmtree(tmp_path / "own")
    with pytest.raises(CheckpointError, match="holds adapters, and their base cannot be read"):
        load_model(resolve_checkpoint(tmp_path / "run"))


def test_what_is_no_adapter_is_told(tmp_path: Path) -> None:
    config, tensors = random_model(family="llama")
    write_checkpoint(tmp_path / "whole", config, tensors)
    with pytest.raises(CheckpointError, match=r"holds a whole model and no adapters; leave --adapter out$"):
        export_adapter(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds a whole model and no adapters; leave --merge out$"):
        export_checkpoint(tmp_path / "whole", tmp_path / "out", merge=True)
    write_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds adapters; --merge writes the model that they make, and --adap"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^lora.rank=2: nothing says which weights the adapters are added to; give "):
        open_base(config.updated({"lora.rank": 2}))
