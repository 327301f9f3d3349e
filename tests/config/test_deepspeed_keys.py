"""The table of DeepSpeed's keys is that of the installed DeepSpeed: its models, and what it asks for while it reads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from pipekit.config.deepspeed_keys import DEEPSPEED_KEYS, TREATMENTS, KeyTree, is_refused, key_table

ROOT = Path(__file__).resolve().parents[2]

MODELS = {
    "zero_optimization": ("runtime.zero.config", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_param": ("runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.offload_optimizer": (
        "runtime.zero.offload_config",
        "DeepSpeedZeroOffloadOptimizerConfig",
    ),
    "zero_optimization.leaf_module": ("runtime.zero.leaf_module_config", "DeepSpeedZeroLeafModuleConfig"),
    "fp16": ("runtime.precision_config", "DeepSpeedFP16Config"),
    "bf16": ("runtime.precision_config", "DeepSpeedBF16Config"),
    "comms_logger": ("comm.config", "CommsLoggerConfig"),
    "tensorboard": ("monitor.config", "TensorBoardConfig"),
    "wandb": ("monitor.config", "WandbConfig"),
    "csv_monitor": ("monitor.config", "CSVConfig"),
    "comet": ("monitor.config", "CometConfig"),
    "compile": ("compile.config", "CompileConfig"),
    "tensor_parallel": ("runtime.tensor_parallel.config", "TPTrainingConfig"),
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


def test_sections_and_plain_keys_are_those_that_deepspeed_asks_for(spied: dict[str, set[str]]) -> None:
    assert spied[""] == set(DEEPSPEED_KEYS)


def test_keys_that_deepspeed_has_removed_are_refused() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    removed = [*_REMOVED_TOP_LEVEL_CONFIG_KEYS, *(f"zero_optimization.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS)]
    assert len(removed) > 10
    taken_over = {"curriculum_learning", "progressive_layer_drop"}
    for path in removed:
        assert is_refused(path, True, "run") == (path not in taken_over)
        assert is_refused(path, True, "pipeline")
        assert is_refused(path, True, "module")


@pytest.mark.parametrize("section", READ_BY_HAND)
def test_keys_of_a_section_are_those_that_deepspeed_asks_for(section: str, spied: dict[str, set[str]]) -> None:
    assert spied[section] == set(subtree(section))


@pytest.mark.parametrize("section", MODELS)
def test_keys_of_a_section_are_the_fields_of_its_model(section: str) -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS

    module, name = MODELS[section]
    fields = getattr(importlib.import_module(f"deepspeed.{module}"), name).model_fields
    removed = _REMOVED_ZERO_CONFIG_KEYS if section == "zero_optimization" else {}
    assert {field.alias or key for key, field in fields.items()} == set(subtree(section)) - set(removed)


def test_keys_of_the_pipeline_are_those_that_its_engine_reads() -> None:
    import inspect

    from deepspeed.runtime.config import get_pipeline_config
    from deepspeed.runtime.pipe import engine

    assert {*get_pipeline_config({}), "use_reentrant"} == set(subtree("pipeline"))
    assert "pipeline['use_reentrant']" in inspect.getsource(engine)


def test_every_model_of_deepspeed_is_compared_or_taken_as_a_whole() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    whole = {"hybrid_engine", "expert_parallel", "zero_optimization.zenflow", "tensor_parallel.tp"}
    whole |= {"weight_quantization"}
    assert all(TREATMENTS[path].refusal for path in whole)
    known = {getattr(importlib.import_module(f"deepspeed.{module}"), name).__name__ for module, name in MODELS.values()}
    values = vars(DeepSpeedConfig({"train_batch_size": 1})).values()
    found = {type(value) for value in values if isinstance(value, DeepSpeedConfigModel)}
    parts = {
        kind
        for model in found
        for field in model.model_fields.values()
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
        if isinstance(kind, type) and issubclass(kind, DeepSpeedConfigModel)
    }
    names = {model.__name__ for model in found | parts} - known
    assert (
        names == {"DeepSpeedMonitorConfig", "HybridEngineConfig", "ZenFlowConfig", "TPConfig", "AutoEPConfig"} & names
    )
    assert len(found | parts) > 12


def test_every_nested_section_of_the_table_is_compared_above() -> None:
    def nested(tree: KeyTree, prefix: str = "") -> set[str]:
        here = {f"{prefix}{key}" for key, below in tree.items() if below is not None}
        return here.union(*(nested(below, f"{prefix}{key}.") for key, below in tree.items() if below is not None))

    assert nested(DEEPSPEED_KEYS) == {*MODELS, *READ_BY_HAND, "pipeline"}


def test_each_key_is_there_once() -> None:
    from pipekit.config.deepspeed_keys import _ROWS

    assert sum(len(keys.split()) for _, keys, _, _ in _ROWS) == len(TREATMENTS)


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    page = (ROOT / "docs/deepspeed.md").read_text(encoding="utf-8")
    assert key_table() in page, f"docs/deepspeed.md needs this table:\n{key_table()}"
