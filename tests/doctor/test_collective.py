"""Verdicts on messages among ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipekit.doctor.collective import CollectiveSpeed, judge_failure, judge_output, judge_speed

FAST = CollectiveSpeed(
    "gloo",
    2,
    True,
    ["a", "a"],
    {"all-reduce": [(1024, 0.0002), (16 << 20, 0.016)], "send": [(1024, 0.0001), (16 << 20, 0.016)]},
)


def test_each_operation_is_told_with_its_times_by_size() -> None:
    reduce, send = judge_speed("gloo", FAST, on_one_machine=True)
    assert (reduce.check, reduce.verdict) == ("gloo: all-reduce", "ok")
    assert reduce.found == "1.05 GB/s; 1 KiB in 0.2 ms, 16 MiB in 16 ms"
    assert send.measured["bytes_per_s"] == pytest.approx((16 << 20) / 0.016)


def test_what_a_rank_sends_in_an_all_reduce_grows_with_their_number() -> None:
    assert replace(FAST, world_size=4).bytes_per_s("all-reduce") == pytest.approx(1.5 * (16 << 20) / 0.016)


def test_few_bytes_or_a_long_wait_are_a_warning() -> None:
    slow = {"all-reduce": [(1024, 0.0002), (16 << 20, 2.0)], "send": [(1024, 0.5)]}
    rows = judge_speed("gloo", replace(FAST, times=slow), on_one_machine=True)
    assert [row.verdict for row in rows] == ["warning", "warning"]
    # A gigabit network brings a tenth of what a machine's own memory does.
    network = {"all-reduce": [(1024, 0.002), (16 << 20, 0.2)]}
    assert judge_speed("gloo", replace(FAST, times=network), on_one_machine=False)[0].verdict == "ok"
    assert judge_speed("gloo", replace(FAST, times=network), on_one_machine=True)[0].verdict == "warning"
    assert (
        judge_speed("all", replace(FAST, times=network, backend="nccl"), on_one_machine=False)[0].verdict == "warning"
    )


def test_wrong_numbers_are_bad() -> None:
    (row,) = judge_speed("gloo", replace(FAST, is_right=False), on_one_machine=True)
    assert (row.verdict, row.found) == ("bad", "ranks received wrong numbers")


def test_ranks_that_end_without_a_result_are_bad() -> None:
    (row,) = judge_output("gloo", "Killed\n", on_one_machine=True)
    assert (row.check, row.verdict, row.found) == ("gloo", "bad", "the ranks ended without a result")


def test_one_rank_has_nobody_to_send_to() -> None:
    alone = CollectiveSpeed("nccl", 1, True, ["a"], {"all-reduce": [(1024, 0.0001)]})
    assert [row.verdict for row in judge_speed("NCCL", alone, on_one_machine=True)] == ["ok"]


def test_ranks_that_fail_are_bad_with_the_beginning_of_the_message() -> None:
    row = judge_failure("gloo", "rank 1 failed:\n\nno route to host\nlast lines of its log:\n...", on_one_machine=False)
    assert (row.verdict, row.found) == ("bad", "rank 1 failed: no route to host")
    assert "--master_addr" in row.advice
