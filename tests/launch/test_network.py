"""The interface that gloo is told to use."""

from __future__ import annotations

import socket
import sys

import pytest

from pipekit.launch import network
from pipekit.launch.environment import RankEnvironment
from pipekit.launch.network import gloo_environ


def ranks(master_addr: str, *, local_world_size: int | None = 2) -> RankEnvironment:
    return RankEnvironment("srun", 2, 4, 0, local_world_size, master_addr, 29500)


ADDRESSES = {"node01": "10.1.0.7", network.ANYWHERE: "10.2.0.7", "localhost": None, "nowhere": None}
INTERFACES = {"10.1.0.7": "ib0", "10.2.0.7": "eth0"}


@pytest.fixture
def two_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "own_address", ADDRESSES.get)
    monkeypatch.setattr(network, "interface_of", INTERFACES.get)


@pytest.mark.usefixtures("two_networks")
@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (ranks("node01"), {}, "ib0"),
        (ranks("node01", local_world_size=None), {}, "ib0"),
        (ranks("node01", local_world_size=4), {}, "lo0" if sys.platform == "darwin" else "lo"),  # all on one machine
        (ranks("node01"), {"GLOO_SOCKET_IFNAME": "eth7"}, None),  # the user's own
        (ranks("localhost"), {}, "eth0"),  # a machine that knows itself as the loopback
        (ranks("nowhere"), {}, "eth0"),
    ],
)
def test_gloo_uses_the_interface_that_reaches_rank_0(
    given: RankEnvironment, environ: dict[str, str], expected: str | None
) -> None:
    assert gloo_environ(given, environ).get("GLOO_SOCKET_IFNAME") == expected


def test_nothing_is_set_where_no_interface_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "own_address", lambda host: None)
    assert gloo_environ(ranks("node01"), {}) == {}


@pytest.mark.skipif(not hasattr(socket, "if_nameindex"), reason="needs interfaces by name")
def test_the_loopback_is_no_way_to_another_machine_and_has_a_name() -> None:
    assert network.own_address("127.0.0.1") is None
    assert network.interface_of("127.0.0.1") == ("lo" if sys.platform == "linux" else None)
    assert network.own_address("no such host") is None
