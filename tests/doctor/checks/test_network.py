"""Verdicts on names, addresses and ports."""

from __future__ import annotations

import socket
import threading

import pytest

from pipekit.doctor.checks import network
from pipekit.doctor.checks.network import (
    NameFacts,
    judge_address,
    judge_listening,
    judge_localhost,
    judge_own_name,
    judge_ports,
    measure_name,
)


def test_a_name_that_does_not_resolve_is_a_warning_with_the_line_to_add() -> None:
    (row,) = judge_own_name(NameFacts("laptop", [], 0.1, False))
    assert row.verdict == "warning"
    assert row.advice == 'Type: echo "127.0.1.1 laptop" | sudo tee -a /etc/hosts'


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        (NameFacts("laptop", ["127.0.1.1"], 0.001, True), "ok"),
        (NameFacts("laptop", ["10.0.0.7"], 0.001, False), "warning"),
        (NameFacts("laptop", ["10.0.0.7"], 3.0, True), "warning"),
        (NameFacts("laptop", None, 5.0, False), "warning"),
    ],
)
def test_own_names(facts: NameFacts, verdict: str) -> None:
    assert judge_own_name(facts)[0].verdict == verdict


def test_localhost_must_be_the_loopback() -> None:
    assert judge_localhost(NameFacts("localhost", ["127.0.0.1", "::1"], 0.0, True))[0].verdict == "ok"
    assert judge_localhost(NameFacts("localhost", ["93.184.216.34"], 0.0, False))[0].verdict == "bad"
    assert judge_localhost(NameFacts("localhost", [], 0.0, False))[0].verdict == "bad"
    assert judge_localhost(NameFacts("localhost", None, 5.0, False))[0].verdict == "bad"


def test_names_are_resolved_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_name("127.0.0.1")
    assert (found.addresses, found.is_own) == (["127.0.0.1"], True)
    monkeypatch.setattr(network, "_RESOLVE_S", 0.05)
    answered = threading.Event()

    def answer_late(*args: object, **options: object) -> list[object]:
        answered.wait(5)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", answer_late)
    assert measure_name("laptop").addresses is None
    answered.set()


def test_a_machine_that_forbids_listening_is_bad() -> None:
    assert judge_listening("Operation not permitted", None)[0].verdict == "bad"
    assert judge_listening(None, "Connection timed out")[0].verdict == "warning"
    assert judge_listening(None, None)[0].verdict == "ok"


def test_a_port_that_is_taken_and_few_outgoing_ones_are_warnings() -> None:
    assert judge_ports(False, 28232)[0].verdict == "ok"
    assert "29500" in judge_ports(True, 28232)[0].found
    assert judge_ports(True, None)[0].verdict == "warning"
    assert judge_ports(False, 100)[0].verdict == "warning"


def test_a_machine_without_a_network_is_well() -> None:
    assert judge_address(None, None)[0].verdict == "ok"
    assert judge_address("10.0.0.7", "eth0")[0].found == "10.0.0.7 on eth0"
