"""The types of DeepSpeed's values are those of DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from pydantic import ValidationError

from pipekit.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS, UNSUPPORTED_KEYS, KeyTree
from pipekit.config.deepspeed_values import VALUE_TYPES, check_deepspeed_values

THEIRS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "compile": CompileConfig,
    "comms_logger": CommsLoggerConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
}
VALUES = [True, "yes", "maybe", "auto", None, 0, 1, 3, -1, 0.5, 2.5, 5e8, "12", "", [], [1], ["a"], {"a": 1}]
# False needs ZeRO 1 or 2, which a configuration of pipekit says elsewhere; 0 and 1 are False and True.
REFUSED_FOR_OTHER_REASONS = [("zero_optimization.compute_grad_norm", 0)]


def nested(name: str, value: Any) -> dict[str, Any]:
    for key in reversed(name.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def leaves(tree: KeyTree, above: tuple[str, ...] = ()) -> list[str]:
    found = []
    for key, below in tree.items():
        found += [".".join((*above, key))] if below is None else leaves(below, (*above, key))
    return found


@pytest.mark.parametrize("name", [name for name in VALUE_TYPES if name.rpartition(".")[0] in THEIRS])
def test_what_deepspeed_checks_is_taken_where_deepspeed_takes_it(name: str) -> None:
    section, _, key = name.rpartition(".")
    kind = THEIRS[section]
    for value in VALUES:
        if (name, value) in REFUSED_FOR_OTHER_REASONS:
            continue
        try:
            kind(**{key: value})
            is_taken = True
        except ValidationError:
            is_taken = False
        assert is_taken == (not list(check_deepspeed_values(nested(name, value)))), value


def test_every_key_has_a_type_or_takes_anything() -> None:
    set_here = {name for name in leaves(DEEPSPEED_KEYS) if any(f"{name}.".startswith(f"{own}.") for own in OWNED_KEYS)}
    anything = {
        *("data_efficiency", "weight_quantization", "datastates_ckpt", "vocabulary_size", "log_level"),
        *("gradient_allreduce_op", "data_types.keep_in_fp32_modules", "compile.passes", "timers."),
    }
    untyped = set(leaves(DEEPSPEED_KEYS)) - set(VALUE_TYPES) - set_here - set(UNSUPPORTED_KEYS)
    left = {n for n in untyped if not n.startswith(("zero_optimization.zenflow", "zero_optimization.leaf_module"))}
    assert left - anything - {name for name in left if name.startswith("comet.")} == set()


def test_the_message_has_the_key_and_the_rule() -> None:
    (fault,) = check_deepspeed_values({"zero_optimization": {"reduce_bucket_size": "big"}})
    assert fault.key == ("deepspeed", "zero_optimization", "reduce_bucket_size")
    assert fault.message == (
        "deepspeed.zero_optimization.reduce_bucket_size=big: must be a whole number greater than 0"
    )
