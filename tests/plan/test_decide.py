"""The plan of a run, without any process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekit.config import Config, parse_config
from pipekit.costs.example import Example
from pipekit.errors import ConfigError, LayoutError, ScheduleError
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec, TiedLayerSpec
from pipekit.models import build_layers
from pipekit.partitioners import minmax_boundaries, partition_uniform
from pipekit.plan.decide import Decision, decide_run
from pipekit.plan.device import plan_device, plan_precision
from pipekit.plan.plan import Plan
from pipekit.plan.resources import Resources
from pipekit.schedules import plan_1f1b
from schedules.tables import post_ahead

NAMES = ["embed", "position", *(f"blocks.{i}.{half}" for i in range(4) for half in ("attention", "mlp")), "final_norm"]


def config_of(*overrides: str) -> Config:
    values = {
        "model": {"preset": "tiny", "vocab_size": 500},
        "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 2},
    }
    return parse_config(values, overrides)


class Given:
    """A trial of some layers."""

    __name__ = "Given"

    def __init__(self, specs: list[LayerSpec], example: Example | None = None) -> None:
        self._specs, self._example = specs, example

    def resolve(self, config: Config, prepared: Mapping[str, Any]) -> Config:
        return config.updated({"model.vocab_size": prepared["vocab_size"]})

    def build_layers(self, config: Config) -> list[LayerSpec]:
        return self._specs

    def example(self, config: Config, micro_batch_size: int) -> Example | None:
        return self._example


def decide(config: Config, specs: list[LayerSpec], example: Example | None = None, **resources: Any) -> Decision:
    return decide_run(config, Given(specs, example), Resources(**resources))


def plan(*overrides: str, world_size: int | None = None, num_devices: int | None = None) -> Plan:
    config = config_of(*overrides)
    return decide(config, build_layers(config), world_size=world_size, num_gpus=num_devices).plan


def test_everything_is_decided() -> None:
    made = plan("parallel.pp=3", world_size=6)
    assert (made.layout.pp, made.layout.dp, made.layout.tp) == (3, 2, 1)
    assert made.batch.num_micro_batches == 4
    assert made.schedule == plan_1f1b(num_stages=3, num_micro_batches=4)
    assert made.layer_names == (*NAMES, "embed")
    assert list(made.boundaries) == minmax_boundaries(made.layer_parameters, 3)
    assert [layer for stage in made.stages for layer in stage] == list(range(12))
    assert [stage.start for stage in made.stages] == list(made.boundaries[:-1])
    assert (made.device, made.precision) == ("cpu", "fp32")


def test_parameters_are_those_of_the_model() -> None:
    made = plan()
    model = SequentialModel(build_layers(config_of()))
    assert made.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(made.layer_parameters) == made.num_parameters + 500 * 128, "the embedding is held twice"


def test_each_kind_of_layer_is_built_once() -> None:
    built: list[int] = []

    class Counted(nn.Linear):
        def __init__(self, size: int) -> None:
            built.append(size)
            super().__init__(size, size)

    specs = [LayerSpec(Counted, size) for size in (2, 3, 2, 3)]
    made = decide(config_of("parallel.pp=2"), specs).plan
    assert (made.layer_parameters, made.num_parameters) == ((6, 12, 6, 12), 36)
    assert built == [2, 3]


def test_each_partitioner_is_used() -> None:
    assert list(plan("parallel.pp=5", "parallel.partition=uniform").boundaries) == partition_uniform(12, 5)
    by_type = plan("parallel.pp=4", "parallel.partition=type:attention")
    assert all(
        sum(made.endswith("attention") for made in by_type.layer_names[s.start : s.stop]) == 1 for s in by_type.stages
    )
    by_hand = plan("parallel.pp=2", "parallel.partition=manual", "parallel.boundaries=[0, 5, 12]")
    assert by_hand.boundaries == (0, 5, 12)


class Reads(nn.Module):
    """Asks for a value, which a tensor without storage does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight * (2.0 if inputs.mean().item() > 0 else 1.0)


def test_layers_are_timed_with_the_threads_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Reads, "threads", set(), raising=False)
    forward = Reads.forward

    def noting(self: Reads, inputs: Tensor) -> Tensor:
        Reads.threads.add(torch.get_num_threads())  # type: ignore[attr-defined]
        return forward(self, inputs)

    monkeypatch.setattr(Reads, "forward", noting)
    config = config_of("parallel.pp=2", "parallel.partition=profile", "run.threads_per_process=1")
    decision = decide(config, [LayerSpec(Reads)] * 5, Example(torch.ones(2, 4)), world_size=2)
    assert decision.partition_inputs.best_costs == "profile"
    assert len(decision.partition_inputs.costs("profile")) == 5
    assert decision.plan.num_threads == 1
    assert Reads.threads == {1}  # type: ignore[attr-defined]


def test_more_stages_than_layers_are_refused() -> None:
    specs = [LayerSpec(nn.Linear, 2, 2)] * 3
    config = parse_config({"model": "my_model:build", "train": {"steps": 1}, "parallel": {"pp": 4}})
    with pytest.raises(LayoutError, match=r"parallel\.pp=4 stages are more than the model's 3 layers"):
        decide(config, specs, world_size=4)


def test_gpus_are_taken_where_they_are() -> None:
    made = plan("parallel.pp=2", num_devices=8)
    assert (made.device, made.precision, made.layout.dp) == ("cuda", "bf16", 4)
    on_cpu = plan("parallel.pp=2", "run.device=cpu", num_devices=8)
    assert (on_cpu.device, on_cpu.precision, on_cpu.layout.dp) == ("cpu", "fp32", 1)
    with pytest.raises(LayoutError, match="needs 12 devices, and 8 are present"):
        plan("parallel.pp=12", "parallel.dp=1", num_devices=8)


def test_a_table_that_would_hang_is_refused_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules["pipekit.schedules.validate"], "plan_operations", lambda table: post_ahead(table, 2)
    )
    with pytest.raises(ScheduleError, match="over NCCL these operations would wait for each other for ever"):
        plan("parallel.pp=2", num_devices=2)
    # Gloo matches messages by sender and receiver.
    assert plan("parallel.pp=2").device == "cpu"


def test_a_launcher_has_the_last_word_on_the_number_of_processes() -> None:
    assert plan("parallel.pp=2", world_size=4, num_devices=8).layout.dp == 2
    with pytest.raises(LayoutError, match="4 processes were started"):
        plan("parallel.pp=2", "parallel.dp=1", world_size=4)


@pytest.mark.parametrize(
    ("asked", "num_devices", "expected"),
    [("auto", None, "cpu"), ("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cpu", 1, "cpu"), ("cuda", 1, "cuda")],
)
def test_the_device(asked: str, num_devices: int | None, expected: str) -> None:
    assert plan_device(config_of(f"run.device={asked}"), num_devices) == expected


@pytest.mark.parametrize("num_devices", [None, 0])
def test_gpus_that_are_not_there_are_refused(num_devices: int | None) -> None:
    with pytest.raises(ConfigError, match=r"run\.device=cuda: no GPU"):
        plan("run.device=cuda", num_devices=num_devices)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_that_is_given_is_taken(precision: str, device: str) -> None:
    assert plan_precision(config_of(f"train.precision={precision}"), device) == precision  # type: ignore[arg-type]


def test_fp16_needs_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("train.precision=fp16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    assert plan_precision(config, "cpu") == "fp16"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert plan_precision(config, "cuda") == "fp16"
    with pytest.raises(ConfigError, match=r"train\.precision=fp16.*try train\.precision=bf16"):
        plan_precision(config, "cpu")


def test_a_torch_without_mkldnn_has_no_fp16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    with pytest.raises(ConfigError, match=r"train\.precision=fp16: this CPU does not"):
        plan_precision(config_of("train.precision=fp16"), "cpu")


def test_a_tie_by_a_parameter_that_is_not_there_is_refused() -> None:
    specs = [
        TiedLayerSpec("embed", nn.Embedding, 4, 4, tied_weight_attr="wieght"),
        TiedLayerSpec("embed", nn.Embedding, 4, 4, tied_weight_attr="wieght"),
    ]
    with pytest.raises(ConfigError, match=r"layer 'embed' is tied by 'wieght'.*try tied_weight_attr='weight'"):
        decide(config_of(), specs)


def test_a_tie_of_a_layer_without_parameters_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"layer 'act' is tied by 'weight', and GELU has no such parameter; it has none$"
    ):
        decide(config_of(), [TiedLayerSpec("act", nn.GELU)])


def test_each_tied_key_is_looked_at() -> None:
    specs = [TiedLayerSpec("a", nn.Linear, 2, 2), TiedLayerSpec("b", nn.Linear, 2, 2, tied_weight_attr=("weight", "x"))]
    with pytest.raises(
        ConfigError, match=r"layer 'b' is tied by 'x', and Linear has no such parameter; it has weight, bias"
    ):
        decide(config_of(), specs)


def test_memory_is_the_gpus_or_a_share_of_the_machines() -> None:
    layout = ("parallel.pp=2", "parallel.partition=memory")
    specs = [LayerSpec(nn.Linear, 64, 64, bias=False)] * 4
    example = Example(torch.empty(2, 64, device="meta"))
    assert decide(config_of(*layout), specs, example, memory_bytes=10**9).plan.boundaries == (0, 2, 4)
    on_gpu = decide(config_of(*layout), specs, example, num_gpus=2, gpu_memory_bytes=2 * 10**9)
    assert (on_gpu.plan.device, on_gpu.plan.boundaries) == ("cuda", (0, 2, 4))
    for resources in ({"memory_bytes": 10**5}, {"num_gpus": 2, "memory_bytes": 10**9, "gpu_memory_bytes": 10**4}):
        with pytest.raises(LayoutError, match="do not fit into the memory"):
            decide(config_of(*layout), specs, example, **resources)


def test_sizes_follow_from_what_was_prepared() -> None:
    config = config_of("model.vocab_size=auto")
    specs = [LayerSpec(nn.Linear, 2, 2)]
    made = decide_run(config, Given(specs), Resources(), prepared={"vocab_size": 77}).plan
    assert made.config.model.vocab_size == 77  # type: ignore[union-attr]
    assert made.prepared == {"vocab_size": 77}


def test_the_cores_are_shared_out_among_the_processes_of_a_machine() -> None:
    config = config_of("parallel.pp=4")
    specs = [LayerSpec(nn.Linear, 2, 2)] * 4
    assert decide(config, specs, num_cpus=8).plan.num_threads == 2
    assert decide(config, specs, num_cpus=8, world_size=4, local_world_size=2).plan.num_threads == 4


def test_trained_again_the_stored_configuration_goes_on() -> None:
    assert plan("checkpoint.resume=never").config.checkpoint.resume == "auto"


def test_frozen_parameters_are_left_out_of_the_count_and_balanced_all_the_same() -> None:
    whole, frozen = (config_of("parallel.pp=2", *more) for more in ((), ('train.freeze=["*.mlp.*", "*.norm.*"]',)))
    made, counted = (decide(config, build_layers(config)).plan for config in (frozen, whole))
    assert made.boundaries == counted.boundaries
    assert made.layer_names[3] == "blocks.0.mlp"
    assert made.layer_parameters[3] == 0 < counted.layer_parameters[3]


def test_a_pattern_that_freezes_nothing_is_refused() -> None:
    config = config_of('train.freeze=["blocks.0.atention.*"]')
    with pytest.raises(ConfigError, match=r"'blocks.0.atention.\*' matches none .* try 'blocks.0.attention.\*'"):
        decide(config, build_layers(config))
