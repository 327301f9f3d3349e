"""Configurations of DeepSpeed's are read from JSON; wrong keys and values are refused, as DeepSpeed refuses values."""

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

from pipekit.config.deepspeed_json import _takes, check_deepspeed
from pipekit.config.deepspeed_keys import TREATMENTS, VALUE_TYPES, Caller

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


@pytest.mark.parametrize("name", [name for name in VALUE_TYPES if name.rpartition(".")[0] in THEIRS])
def test_what_deepspeed_checks_is_taken_where_deepspeed_takes_it(name: str) -> None:
    section, _, key = name.rpartition(".")
    kind = THEIRS[section]
    if VALUE_TYPES[name] is Any or TREATMENTS[name].refusal == "DeepSpeed has removed it":
        return
    for value in VALUES:
        if (name, value) in REFUSED_FOR_OTHER_REASONS:
            continue
        try:
            kind(**{key: value})
            is_taken = True
        except ValidationError:
            is_taken = False
        assert is_taken == (value == "auto" or _takes(name, value)), value


def test_every_key_has_a_type_or_takes_anything() -> None:
    anything = {
        *("log_level", "vocabulary_size", "data_types.keep_in_fp32_modules"),
        *(
            f"comet.{key}"
            for key in ["project", "workspace", "api_key", "experiment_name", "experiment_key", "online", "mode"]
        ),
    }
    refused = {name for name, treatment in TREATMENTS.items() if treatment.refusal}
    assert {name for name, kind in VALUE_TYPES.items() if kind is Any} - refused == anything


@pytest.mark.parametrize(
    ("section", "caller", "message"),
    [
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "module",
         "x.zero_optimization.zenflow: has no effect here, since ZenFlow brings optimizers of its own; remove it"),
        ({"zero_optimization": {"overlap_com": True}}, "run",
         "x.zero_optimization.overlap_com: unknown key; did you mean 'x.zero_optimization.overlap_comm'?"),
        ({"wall_clock_brakdown": True}, "module", "x.wall_clock_brakdown: unknown key; did you mean "
         "'x.wall_clock_breakdown'?"),
        ({"gradient_cliping": 1}, "run", "x.gradient_cliping: unknown key; did you mean 'x.gradient_clipping'?"),
        ({"fp16": True}, "run", "x.fp16=true: must be a mapping; for example fp16: {auto_cast: ...}"),
        ({"data_types": {"zzz": 1}}, "run", "x.data_types.zzz: unknown key; x.data_types has buffer_dtype, "
         "grad_accum_dtype, keep_in_fp32_modules and param_dtype"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "pipeline",
         "x.zero_optimization.reduce_bucket_size=big: must be a whole number greater than 0"),
        ({"expert_parallel": {"enabled": True}}, "module",
         "x.expert_parallel: has no effect here, since expert parallelism is not available yet; remove it"),
        ({"gradient_allreduce_op": "sum"}, "pipeline", "x.gradient_allreduce_op=sum: has no effect here, since the "
         "gradients of replicas are summed in fp32 and averaged; remove it"),
        ({"zzz": 1}, "run", "x.zzz: unknown key; see https://www.deepspeed.ai/docs/config-json/ for the keys of "
         "DeepSpeed"),
    ],
)  # fmt: skip
def test_wrong_keys_and_values_are_refused(section: dict[str, Any], caller: Caller, message: str) -> None:
    (fault,) = check_deepspeed(section, caller, owner="x.")
    assert fault.message == message


@pytest.mark.parametrize(
    "section",
    [
        {"zero_optimization": {"reduce_bucket_size": 5e8, "offload_optimizer": {"pin_memory": True}}},
        {"prescale_gradients": False, "gradient_predivide_factor": 1.0, "expert_parallel": {"enabled": False}},
        {"zero_optimization": {"reduce_bucket_size": "auto", "zenflow": "auto"}, "fp16": None},
        {"flops_profiler": {"enabled": True, "detailed": True, "output_file": None}},
    ],
)
def test_what_takes_effect_or_says_what_holds_is_taken(section: dict[str, Any]) -> None:
    assert list(check_deepspeed(section, "run")) == []
