"""Choosing the port of rank 0."""

from __future__ import annotations

import re
import socket

import pytest

from pipekit.errors import LaunchError
from pipekit.launch.ports import choose_port


def test_a_chosen_port_is_free() -> None:
    port = choose_port(None)
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert choose_port(port) == port


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_an_occupied_port_is_refused_and_another_offered(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=f"^port {port} cannot be used .*listens") as caught:
            choose_port(port)
    offered = re.search(r"try (\d+)", str(caught.value))
    assert offered is not None
    assert choose_port(int(offered[1])) == int(offered[1])


def test_a_port_that_cannot_exist_is_refused() -> None:
    with pytest.raises(LaunchError, match="port 70000 must be between 1 and 65535"):
        choose_port(70000)
