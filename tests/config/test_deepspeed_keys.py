"""The table of DeepSpeed's keys is that of the installed DeepSpeed, and wrong keys are refused."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from pipekit.config import parse_config
from pipekit.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS, UNSUPPORTED_KEYS, KeyTree
from pipekit.errors import ConfigError

BASE: dict[str, Any] = {"model": {"preset": "tiny"}, "train": {"steps": 3}}

MODELS = {
    "zero_optimization": ("runtime.zero.config", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_param": ("runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.offload_optimizer": (
        "runtime.zero.offload_config",
        "DeepSpeedZeroOffloadOptimizerConfig",
    ),
    "zero_optimization.zenflow": ("runtime.zenflow.zenflow_config", "ZenFlowConfig"),
    "zero_optimization.leaf_module": ("runtime.zero.leaf_module_config", "DeepSpeedZeroLeafModuleConfig"),
    "fp16": ("runtime.precision_config", "DeepSpeedFP16Config"),
    "bf16": ("runtime.precision_config", "DeepSpeedBF16Config"),
    "comms_logger": ("comm.config", "CommsLoggerConfig"),
    "csv_monitor": ("monitor.config", "CSVConfig"),
    "comet": ("monitor.config", "CometConfig"),
    "compile": ("compile.config", "CompileConfig"),
    "timers.throughput": ("utils.config", "DeepSpeedThroughputTimerConfig"),
}
"""Sections that DeepSpeed reads with a pydantic model."""

READ_BY_HAND = [
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "data_types",
    "flops_profiler",
    "timers",
    "torch_autocast",
]
"""Sections whose keys DeepSpeed asks for one by one."""


class Spy(dict[str, Any]):
    """A dict that notes which keys are asked for."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        """Let `key in values.keys()` be noted too."""
        return self

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __copy__(self) -> Spy:
        return self


def subtree(path: str) -> KeyTree:
    tree = DEEPSPEED_KEYS
    for part in path.split("."):
        below = tree[part]
        assert below is not None
        tree = below
    return tree


@pytest.fixture(scope="module")
def spied() -> dict[str, set[str]]:
    """The keys that DeepSpeed asks for while it reads a configuration, by section; "" holds the sections."""
    runtime_config = pytest.importorskip("deepspeed.runtime.config")
    whole = Spy({"train_batch_size": 1, **{name: Spy() for name in READ_BY_HAND}})
    runtime_config.DeepSpeedConfig(whole)
    return {"": whole.asked, **{name: dict.__getitem__(whole, name).asked for name in READ_BY_HAND}}


def test_sections_and_plain_keys_are_those_that_deepspeed_asks_for(spied: dict[str, set[str]]):
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    assert spied[""] - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) == set(DEEPSPEED_KEYS)


@pytest.mark.parametrize("section", READ_BY_HAND)
def test_keys_of_a_section_are_those_that_deepspeed_asks_for(section: str, spied: dict[str, set[str]]):
    assert spied[section] == set(subtree(section))


@pytest.mark.parametrize("section", MODELS)
def test_keys_of_a_section_are_the_fields_of_its_model(section: str):
    pytest.importorskip("deepspeed")
    module, name = MODELS[section]
    fields = getattr(importlib.import_module(f"deepspeed.{module}"), name).model_fields
    assert {field.alias or key for key, field in fields.items()} == set(subtree(section))


def test_every_nested_section_of_the_table_is_compared_above():
    def nested(tree: KeyTree, prefix: str = "") -> set[str]:
        here = {f"{prefix}{key}" for key, below in tree.items() if below is not None}
        return here.union(*(nested(below, f"{prefix}{key}.") for key, below in tree.items() if below is not None))

    assert nested(DEEPSPEED_KEYS) == {*MODELS, *READ_BY_HAND}


def test_owned_and_unsupported_keys_are_keys_of_deepspeed():
    for path in [*OWNED_KEYS, *UNSUPPORTED_KEYS]:
        parent, _, key = path.rpartition(".")
        assert key in (subtree(parent) if parent else DEEPSPEED_KEYS)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"train_batch_size": 3},
            "deepspeed.train_batch_size: pipekit sets this itself; use train.global_batch_size instead",
        ),
        (
            {"zero_optimization": {"stage": 1}},
            "deepspeed.zero_optimization.stage: pipekit sets this itself; use parallel.zero instead",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "deepspeed.zero_optimization.offload_optimizer.device: pipekit sets this itself; use parallel.offload "
            "instead",
        ),
        (
            {"zero_optimization": {"cpu_offload_param": True}},
            "deepspeed.zero_optimization.cpu_offload_param: pipekit sets this itself; use "
            "parallel.offload=parameters instead",
        ),
        (
            {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}},
            "deepspeed.zero_optimization.zenflow: has no effect here, since ZenFlow brings optimizers of its own; "
            "remove it",
        ),
        (
            {"fp16": {"enabled": True}},
            "deepspeed.fp16.enabled: pipekit sets this itself; use train.precision=fp16 instead",
        ),
        (
            {"optimizer": {"type": "Lamb"}},
            "deepspeed.optimizer: pipekit sets this itself; use the optimizer section instead",
        ),
        (
            {"zero_optimization": {"overlap_com": True}},
            "deepspeed.zero_optimization.overlap_com: unknown key; "
            "did you mean 'deepspeed.zero_optimization.overlap_comm'?",
        ),
        (
            {"wall_clock_brakdown": True},
            "deepspeed.wall_clock_brakdown: unknown key; did you mean 'deepspeed.wall_clock_breakdown'?",
        ),
        (
            {"gradient_cliping": 1},
            "deepspeed.gradient_cliping: unknown key; use train.gradient_clipping instead",
        ),
        ({"fp16": True}, "deepspeed.fp16=true: must be a mapping; for example fp16: {auto_cast: ...}"),
        (
            {"expert_parallel": {}},
            "deepspeed.expert_parallel: has no effect here, since expert parallelism is not available yet; remove it",
        ),
        (
            {"data_types": {"zzz": 1}},
            "deepspeed.data_types.zzz: unknown key; deepspeed.data_types has buffer_dtype, "
            "grad_accum_dtype, keep_in_fp32_modules and param_dtype",
        ),
    ],
)
def test_wrong_keys_are_refused(section: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        parse_config({**BASE, "deepspeed": section})
    assert str(caught.value) == message


def test_known_keys_pass_through_untouched():
    section = {
        "zero_optimization": {"reduce_bucket_size": 5e8, "offload_optimizer": {"pin_memory": True}},
        "fp16": {"loss_scale_window": 100},
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": True,
    }
    config = {**BASE, "parallel": {"offload": "optimizer"}, "deepspeed": section}
    assert parse_config(config).deepspeed == section
