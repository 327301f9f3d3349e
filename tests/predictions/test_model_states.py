"""Bytes of a parameter, against the exact bytes of large tensors and the table of the ZeRO paper."""

from __future__ import annotations

import pytest

from pipekit.predictions.elements import BYTES_PER_ELEMENT, Precision
from pipekit.predictions.model_states import ADAM_STATES, OptimizerStates, bytes_per_parameter, model_states


@pytest.mark.parametrize(
    ("precision", "zero", "bytes_each"), [("fp32", 0, 16), ("fp32", 1, 11), ("bf16", 1, 9), ("fp16", 0, 9)]
)
def test_bytes_of_a_parameter_over_four_replicas(precision: Precision, zero: int, bytes_each: float) -> None:
    assert bytes_per_parameter(precision=precision, zero=zero, dp=4) == bytes_each


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("states", [ADAM_STATES, OptimizerStates(1, 0), OptimizerStates(0, 0)])
def test_a_large_tensor_holds_what_its_parameters_hold(
    precision: Precision, zero: int, states: OptimizerStates
) -> None:
    exact = model_states([{"weight": (10**4, 10**4)}], precision=precision, zero=zero, dp=4, states=states).standing
    each = bytes_per_parameter(precision=precision, zero=zero, dp=4, states=states)
    # It is the largest, too, whose gradient is there once more before it is added.
    added = BYTES_PER_ELEMENT[precision] if zero < 2 else 0
    assert exact == pytest.approx((each + added) * 10**8, rel=1e-6)


def test_fp16_under_zero_follows_the_paper_but_for_gradients_in_fp32() -> None:
    """Rajbhandari et al. 2020, "ZeRO", section 3.1: 2 + 2 + 12 bytes; here gradients have 4 bytes."""
    assert [bytes_per_parameter(precision="fp16", zero=zero, dp=64) for zero in (1, 2, 3)] == [
        2 + 4 + 12 / 64,
        2 + (4 + 12) / 64,
        (2 + 4 + 12) / 64,
    ]
