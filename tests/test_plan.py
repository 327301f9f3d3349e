"""The plan of a run, without any process."""

from __future__ import annotations

import pytest
from torch import nn

from pipekit.config import Config, parse_config
from pipekit.errors import ConfigError, LayoutError
from pipekit.models import build_layers
from pipekit.plan import Plan, plan_precision, plan_run
from pipekit.specs import TiedLayerSpec


def config_of(*overrides: str) -> Config:
    values = {
        "model": {"preset": "tiny", "vocab_size": 500},
        "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 2},
    }
    return parse_config(values, overrides)


def plan(*overrides: str, world_size: int | None = None, num_devices: int | None = None) -> Plan:
    config = config_of(*overrides)
    return plan_run(config, build_layers(config), world_size=world_size, num_devices=num_devices)


def test_everything_is_decided() -> None:
    made = plan("parallel.pp=3", world_size=6)
    assert (made.layout.pp, made.layout.dp, made.layout.tp) == (3, 2, 1)
    assert made.batch.num_micro_batches == 4
    assert made.schedule.num_micro_batches == 4
    assert len(made.schedule.ranks) == 3
    assert [len(stage) for stage in made.stages] == [stage.stop - stage.start for stage in made.stages]
    assert [layer for stage in made.stages for layer in stage] == list(range(12))
    tied_twice = sum(made.layer_parameters) - 500 * 128
    assert made.num_parameters == tied_twice
    assert (made.device, made.precision) == ("cpu", "fp32")


def test_gpus_are_taken_where_they_are() -> None:
    made = plan("parallel.pp=2", num_devices=8)
    assert (made.device, made.precision, made.layout.dp) == ("cuda", "bf16", 4)
    on_cpu = plan("parallel.pp=2", "run.device=cpu", num_devices=8)
    assert (on_cpu.device, on_cpu.precision, on_cpu.layout.dp) == ("cpu", "fp32", 1)
    with pytest.raises(LayoutError, match="needs 12 devices, and 8 are present"):
        plan("parallel.pp=12", "parallel.dp=1", num_devices=8)


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.device=cuda: no GPU"):
        plan("run.device=cuda")


def test_a_tie_by_a_parameter_that_is_not_there_is_refused() -> None:
    specs = [
        TiedLayerSpec("embed", nn.Embedding, 4, 4, tied_weight_attr="wieght"),
        TiedLayerSpec("embed", nn.Embedding, 4, 4, tied_weight_attr="wieght"),
    ]
    with pytest.raises(ConfigError, match=r"layer 'embed' is tied by 'wieght'.*try tied_weight_attr='weight'"):
        plan_run(config_of(), specs, world_size=None, num_devices=None)


def test_boundaries_by_hand() -> None:
    made = plan("parallel.pp=2", "parallel.partition=manual", "parallel.boundaries=[0, 5, 12]")
    assert list(made.boundaries) == [0, 5, 12]


def test_fp16_needs_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    config = config_of("train.precision=fp16")
    assert plan_precision(config, "cuda") == "fp16"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.precision=fp16.*try train\.precision=bf16"):
        plan_precision(config, "cpu")
