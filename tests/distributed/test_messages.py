"""Messages between processes: what is sent arrives as it was, and nothing else is made of what is received."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipekit.distributed import messages
from pipekit.distributed.messages import decode_message, encode_message
from pipekit.distributed.rank_role import RankRole
from pipekit.errors import ConfigError, ExitCode

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.frozensets(st.integers() | st.text())
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_arrive_as_they_were(value: Any) -> None:
    arrived = decode_message(encode_message(value))
    assert arrived == value
    assert type(arrived) is type(value)


def test_a_number_that_is_none_arrives() -> None:
    assert math.isnan(decode_message(encode_message(math.nan)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_tensors_arrive_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    arrived = decode_message(encode_message({"a": tensor}))["a"]
    assert (arrived.dtype, arrived.shape) == (dtype, tensor.shape)
    assert torch.equal(arrived, tensor)


def test_a_transposed_tensor_and_arrays_arrive() -> None:
    tensor, array = torch.randn(2, 3).t(), np.arange(6.0).reshape(2, 3)[:, ::2]
    arrived = decode_message(encode_message((tensor, array, np.float32(1.5), np.int64(3))))
    assert torch.equal(arrived[0], tensor)
    assert np.array_equal(arrived[1], array)
    assert (arrived[2], arrived[2].dtype) == (1.5, np.float32)
    assert (arrived[3], arrived[3].dtype) == (3, np.int64)


def test_records_enums_and_errors_of_pipekit_arrive() -> None:
    value = [RankRole(1, 2, True, False), ExitCode.HANG, ConfigError]
    assert decode_message(encode_message(value)) == value


@dataclass
class Foreign:
    number: int


@pytest.mark.parametrize("value", [object(), Foreign(1), ValueError, {"deep": [lambda: 1]}, np.array([object()]), 1j])
def test_anything_else_is_not_sent(value: object) -> None:
    with pytest.raises(TypeError, match=r"is not sent between processes"):
        encode_message(value)


@pytest.mark.parametrize(
    "packed",
    [
        ["\0", "record", "subprocess:Popen", ["args", "true"]],
        ["\0", "record", "pipekit.launch.local:subprocess.Popen", ["args", "true"]],
        ["\0", "record", "pipekit.distributed.messages:Foreign", ["number", 1]],
        ["\0", "record", "pipekit.errors:ConfigError"],
        ["\0", "enum", "pipekit.errors:PipekitError", 1],
        ["\0", "class", "builtins:eval"],
        ["\0", "class", "pipekit.distributed.rank_role:RankRole"],
        ["\0", "tensor", "load", [1], ""],
        ["\0", "unknown"],
        ["other", 1],
    ],
)
def test_nothing_else_is_made_of_a_message(packed: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("code has run"))
    monkeypatch.setattr(messages, "Foreign", Foreign, raising=False)  # as a class that a module of pipekit's imports
    with pytest.raises(ValueError, match=r"^no "):
        decode_message(json.dumps(packed).encode())
