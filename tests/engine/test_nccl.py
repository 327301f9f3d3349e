"""Engines over process groups that behave like NCCL's: every schedule and layout, and bugs that are put in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from engine.test_schedules import SCHEDULES, assert_same, reference, run
from engine_jobs import (
    Case,
    assert_trained_as_one_process,
    build_engine,
    micro_batches,
    reference_run,
    show,
    train_job,
)
from gloo_workers import GlooWorkers, RankError
from schedules.tables import post_ahead

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
@pytest.mark.parametrize("pp", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_has_the_gradients_of_one_process(gloo: GlooWorkers, schedule: str, pp: int, tied: bool) -> None:
    case = Case(pp=pp, schedule=schedule, tied=tied, steps=4 if schedule == "auto" else 2)
    assert_same(run(gloo, case, nccl=True), reference(tied))


@pytest.mark.parametrize("case", [
    Case(pp=2, dp=2, schedule="zb-v"),
    Case(pp=2, tp=2, schedule="zb-h1"),
    Case(dp=2, zero=2),
    Case(dp=2, zero=3),
    *(pytest.param(case, marks=pytest.mark.slow) for case in (
        Case(pp=2, dp=2, zero=0),
        Case(pp=2, dp=2, schedule="interleaved-1f1b"),
        Case(pp=2, tp=2, sequence_parallel=False),
        Case(pp=2, tp=2, checkpointing=True, loss_chunk_tokens=5),
        Case(pp=2, checkpointing=True, schedule="zb-v"),
        Case(pp=2, dp=2, tp=2, schedule="zb-v"),
    )),
], ids=show)  # fmt: skip
def test_every_layout_trains_as_one_process(gloo: GlooWorkers, case: Case) -> None:
    case = replace(case, steps=3)
    assert_trained_as_one_process(gloo.run(case.world_size, train_job, case, {}, nccl=True), case)


def write_to_what_is_sent() -> None:
    from pipekit.engine.channels import Sender

    send = Sender.send

    def changed(self: Sender, action: Any, tensors: Any, **options: Any) -> None:
        send(self, action, tensors, **options)
        for tensor in tensors:
            tensor.detach().zero_()

    Sender.send = changed  # type: ignore[method-assign]


def let_go_of_what_is_sent() -> None:
    from pipekit.engine.channels import Sender

    send = Sender.send

    def changed(self: Sender, action: Any, tensors: Any, **options: Any) -> None:
        send(self, action, tensors, **options)
        # The description is gloo's, which keeps to other rules.
        if options.get("header") is None:
            self._pending.popitem()

    Sender.send = changed  # type: ignore[method-assign]


def use_what_has_not_arrived() -> None:
    from pipekit.engine.channels import Receiver

    Receiver.receive = lambda self, action: self._posted.pop(action)[1]  # type: ignore[method-assign]


def use_gradients_that_are_not_reduced() -> None:
    from pipekit.engine import reduction

    reduction.wait = lambda work, what: None


def swap_two_receives() -> None:
    from pipekit.engine import executor

    plan_operations = executor.plan_operations

    def changed(schedule: Any, **options: Any) -> Any:
        rows = [list(row) for row in plan_operations(schedule, **options)]
        first, second = [index for index, operation in enumerate(rows[1]) if operation.kind == "post"][:2]
        rows[1][first], rows[1][second] = rows[1][second], rows[1][first]
        return rows

    executor.plan_operations = changed


def train_with(rank: int, case: Case, put_in: Callable[[], None]) -> None:
    put_in()
    engine = build_engine(case)
    expected = reference_run(case)
    for step in range(case.steps):
        loss = float(engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank)))
        found = (loss, engine.grad_norm)
        assert found == pytest.approx((expected["losses"][step], expected["norms"][step]), rel=1e-4), f"found {found}"


@pytest.mark.parametrize(("put_in", "case", "message"), [
    (write_to_what_is_sent, Case(pp=2), "the send of .*, was written to before it had left"),
    (let_go_of_what_is_sent, Case(pp=2), "rank 1: .*the send of .* to rank 0, was let go before it had left"),
    (use_what_has_not_arrived, Case(pp=2), r"found \(nan"),
    (use_gradients_that_are_not_reduced, Case(pp=2, dp=2), r"found \([0-9.]+, (nan|inf|-1)"),
    (swap_two_receives, Case(pp=2), r"found \([0-9.]+, [0-9.]+\)"),
], ids=lambda value: value.__name__ if callable(value) else "")  # fmt: skip
def test_a_bug_is_found(gloo: GlooWorkers, put_in: Callable[[], None], case: Case, message: str) -> None:
    with pytest.raises(RankError, match=message):
        gloo.run(case.world_size, train_with, replace(case, steps=2), put_in, nccl=True)


def train_with_receives_posted_ahead(rank: int, pp: int, has_pairs: bool) -> None:
    from pipekit.engine import channel_ends, executor

    channel_ends.has_pairs = lambda: has_pairs
    case = Case(pp=pp)
    engine = build_engine(case)
    engine.train_batch(micro_batches(0, case, 0))
    # From the second step on, the shapes of all messages are known.
    executor.plan_operations = lambda schedule, **options: tuple(map(tuple, post_ahead(schedule, 2)))
    engine.executor._tables.clear()
    for group in engine.executor._ends._groups.values():
        group.process_group.timeout = timedelta(seconds=60 if has_pairs else 2)
    engine.train_batch(micro_batches(1, case, 0))


def test_receives_posted_ahead_in_one_group_for_each_direction_hang_from_three_stages_on(gloo: GlooWorkers) -> None:
    gloo.run(3, train_with_receives_posted_ahead, 3, True, nccl=True)
    with pytest.raises(RankError, match=r"rank 1 failed while waiting for .* has not ended in time, behind"):
        gloo.run(3, train_with_receives_posted_ahead, 3, False, nccl=True)
