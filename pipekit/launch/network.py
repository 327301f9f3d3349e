"""The network interface over which gloo reaches the other machines of a run."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress

from pipekit.launch.environment import RankEnvironment

_SIOCGIFADDR = 0x8915  # linux/sockios.h
# A documentation address (RFC 5737), to which no machine answers: the route to it is the default one.
ANYWHERE = "192.0.2.1"


def gloo_environ(ranks: RankEnvironment, environ: Mapping[str, str]) -> dict[str, str]:
    """`GLOO_SOCKET_IFNAME` of a rank: the interface that reaches the machine of rank 0, or the loopback on one machine.

    Gloo would take the address of the machine's own name, which on many is 127.0.1.1, and on many laptops cannot be
    found; and on one machine nobody else need reach it. NCCL chooses well by itself. Empty where the user has set the
    variable, and where no such interface is found.
    """
    if "GLOO_SOCKET_IFNAME" in environ:
        return {}
    if ranks.local_world_size == ranks.world_size:
        return {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    # The machine of rank 0 may know its own name as that of the loopback.
    for host in (ranks.master_addr, ANYWHERE):
        address = own_address(host)
        name = interface_of(address) if address is not None else None
        if name is not None:
            return {"GLOO_SOCKET_IFNAME": name}
    return {}


def own_address(host: str) -> str | None:
    """Address from which this machine reaches a host; None over the loopback, or where there is no route."""
    # Connecting a datagram socket sends nothing; it looks the route up.
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))
        address: str = sock.getsockname()[0]
        return None if ipaddress.ip_address(address).is_loopback else address
    return None


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface that has an IPv4 address; None where there is none, or it is unknown."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                reply = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(reply[20:24]) == address:
                    return name
    return None
