"""Network: hostname, addresses to listen on, and ports."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipekit.doctor.rows import Row, Site
from pipekit.launch.machines import DEFAULT_PORT
from pipekit.launch.network import ANYWHERE, interface_of, own_address

_RESOLVE_S = 5.0
_SLOW_S = 0.5
_FEW_PORTS = 5000
_LISTEN_S = 2.0


@dataclass(frozen=True)
class NameFacts:
    """Resolution of a host name.

    Attributes:
        name: the name.
        addresses: its addresses; None if there was no answer in time.
        seconds: duration of the resolution.
        is_own: whether this machine has one of the addresses.
    """

    name: str
    addresses: Sequence[str] | None
    seconds: float
    is_own: bool


def check_own_name(site: Site) -> list[Row]:
    """Resolution of this machine's hostname, which fails on many laptops."""
    return judge_own_name(measure_name(socket.gethostname()))


def check_localhost(site: Site) -> list[Row]:
    """Resolution of `localhost`, which should be a loopback address."""
    return judge_localhost(measure_name("localhost"))


def check_address(site: Site) -> list[Row]:
    """Address at which other machines reach this one."""
    address = own_address(ANYWHERE)
    return judge_address(address, address and interface_of(address))


def check_listening(site: Site) -> list[Row]:
    """Listening on the loopback address and on all addresses, and connecting there."""
    return judge_listening(_error_of_listening("127.0.0.1"), _error_of_listening("0.0.0.0"))


def check_ports(site: Site) -> list[Row]:
    """Default port of rank 0, and ports for outgoing connections."""
    num_outgoing = None
    with suppress(OSError, ValueError):
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        num_outgoing = int(last) - int(first) + 1
    is_taken = False
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", DEFAULT_PORT))
        except OSError:
            is_taken = True
    return judge_ports(is_taken, num_outgoing)


def measure_name(name: str) -> NameFacts:
    """Resolve a name within a time limit, since a name server may not answer."""
    found: list[list[str]] = []

    def resolve() -> None:
        try:
            found.append(sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}))
        except (OSError, UnicodeError):
            found.append([])

    start_s = time.monotonic()
    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_RESOLVE_S)
    addresses = found[0] if found else None
    return NameFacts(name, addresses, time.monotonic() - start_s, any(map(_is_own, addresses or ())))


def judge_own_name(facts: NameFacts) -> list[Row]:
    """Row of the hostname. pipekit does not need it to resolve, but other programs may."""
    in_hosts = f'Type: echo "127.0.1.1 {facts.name}" | sudo tee -a /etc/hosts'
    server = "The name server in /etc/resolv.conf may not answer."
    if facts.addresses is None:
        text = f"{facts.name} did not resolve within {_RESOLVE_S:.0f} s"
        return [Row("hostname", "warning", text, f"{server} {in_hosts}")]
    if not facts.addresses:
        text = f"{facts.name} does not resolve; torchrun would not find this machine"
        return [Row("hostname", "warning", text, in_hosts)]
    text = f"{facts.name} resolves to {', '.join(facts.addresses[:3])}"
    if not facts.is_own:
        advice = f"Correct its line in /etc/hosts, or the name server. {in_hosts}"
        return [Row("hostname", "warning", f"{text}, which is not this machine", advice)]
    if facts.seconds > _SLOW_S:
        return [Row("hostname", "warning", f"{text}, resolved in {facts.seconds:.1f} s", f"{server} {in_hosts}")]
    return [Row("hostname", "ok", text)]


def judge_localhost(facts: NameFacts) -> list[Row]:
    """Row of `localhost`."""
    if facts.addresses and all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in facts.addresses):
        return [Row("localhost", "ok", ", ".join(facts.addresses))]
    found = "does not resolve" if not facts.addresses else f"resolves to {', '.join(facts.addresses)}"
    return [Row("localhost", "bad", found, 'Type: echo "127.0.0.1 localhost" | sudo tee -a /etc/hosts')]


def judge_address(address: str | None, interface: str | None) -> list[Row]:
    """Row of this machine's address; None if it has no network."""
    if address is None:
        return [Row("address", "ok", "none; runs can only use this machine")]
    return [Row("address", "ok", address if interface is None else f"{address} on {interface}")]


def judge_listening(loopback_error: str | None, all_error: str | None) -> list[Row]:
    """Row of listening, with the errors on the loopback address and on all addresses."""
    advice = "A firewall or sandbox forbids it, but ranks need it to reach each other, even on one machine."
    if loopback_error is not None:
        return [Row("listening", "bad", f"on 127.0.0.1: {loopback_error}", advice)]
    if all_error is not None:
        text = f"on all addresses: {all_error}"
        return [Row("listening", "warning", text, "Runs on several machines cannot put rank 0 here.")]
    return [Row("listening", "ok", "works on the loopback address and on all addresses")]


def judge_ports(is_taken: bool, num_outgoing: int | None) -> list[Row]:
    """Row of ports: whether rank 0's default port is taken, and the number for outgoing connections."""
    if num_outgoing is not None and num_outgoing < _FEW_PORTS:
        advice = 'Type: sudo sysctl -w net.ipv4.ip_local_port_range="32768 60999"'
        return [Row("ports", "warning", f"only {num_outgoing:,} for outgoing connections", advice)]
    if is_taken:
        text = f"{DEFAULT_PORT}, the default port of rank 0, is taken"
        advice = "pipekit finds a free one by itself; torchrun, MPI and --nnodes need --master_port or MASTER_PORT."
        return [Row("ports", "warning", text, advice)]
    return [Row("ports", "ok", f"{DEFAULT_PORT}, the default port of rank 0, is free")]


def _is_own(address: str) -> bool:
    """True if the address is this machine's, so a socket can bind to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind((address, 0))
        return True
    return False


def _error_of_listening(address: str) -> str | None:
    try:
        with socket.create_server((address, 0)) as server:
            server.settimeout(_LISTEN_S)
            with socket.create_connection(("127.0.0.1", server.getsockname()[1]), timeout=_LISTEN_S) as client:
                accepted, _ = server.accept()
                with accepted:
                    accepted.settimeout(_LISTEN_S)
                    client.sendall(b"?")
                    accepted.recv(1)
    except OSError as error:
        return error.strerror or str(error)
    return None
