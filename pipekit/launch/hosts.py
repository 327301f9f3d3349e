"""Hosts of a run: the hostfile, and the hosts and slots that `--include`, `--exclude` and the counts leave of it.

The formats are DeepSpeed's. Pure: nothing is asked of any host.

Source: deepspeed/launcher/runner.py (`_parse_hostfile`, `parse_resource_filter`, `apply_num_nodes_and_gpus`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipekit.errors import LaunchError
from pipekit.settings.suggest import closest

# No program that is given such a name takes it for an option, a path or a user.
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,9})\s*(?:#.*)?")
_MOST_SLOTS = 1024
_MOST_BYTES = 1 << 20
_EXAMPLE = "worker-1 slots=4"


@dataclass(frozen=True)
class Host:
    """A host of a run.

    Attributes:
        name: its name, as ssh and the other hosts know it.
        slots: numbers of its slots that are used; each is the place of one process, and of one GPU where there are any.
    """

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of slots of every host in a hostfile, in its order.

    Raises:
        LaunchError: if it cannot be read, or a line is wrong; the message names the line.
    """
    if not path.is_file():
        why = "is not a file" if path.exists() else "no such file"
        raise LaunchError(f"--hostfile {path}: {why}; give a file with lines such as {_EXAMPLE}")
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise LaunchError(f"--hostfile {path}: is longer than {_MOST_BYTES:,} bytes, and no hostfile; see its path")
        return parse_hostfile(data.decode("utf-8"), where=str(path))
    except OSError as error:
        raise LaunchError(f"--hostfile {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise LaunchError(
            f"--hostfile {path}: byte {error.start} is not UTF-8; write lines such as {_EXAMPLE}"
        ) from None


def parse_hostfile(text: str, *, where: str = "hostfile") -> dict[str, int]:
    """Return the number of slots of every host in the text of a hostfile, in its order.

    Raises:
        LaunchError: if a line is wrong; the message begins with `where` and the line's number.

    Example:
        >>> parse_hostfile('''
        ... # two machines
        ... worker-1 slots=4
        ... worker-2 slots=8
        ... ''')
        {'worker-1': 4, 'worker-2': 8}
    """
    hosts: dict[str, int] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = _LINE.fullmatch(stripped)
        if match is None:
            raise LaunchError(f"{where}, line {number}: {_show(stripped)} is no host and its slots; write {_EXAMPLE}")
        name, num_slots = match[1], int(match[2])
        _check_name(name, f"{where}, line {number}")
        if not 1 <= num_slots <= _MOST_SLOTS:
            raise LaunchError(
                f"{where}, line {number}: slots={num_slots} must be between 1 and {_MOST_SLOTS}; "
                "leave a host out with a # before its line"
            )
        if name in hosts:
            raise LaunchError(
                f"{where}, line {number}: {name} stands in line {lines[name]} already; give each host one line"
            )
        hosts[name], lines[name] = num_slots, number
    if not hosts:
        raise LaunchError(f"{where}: names no host; write a line such as {_EXAMPLE}")
    return hosts


def select_hosts(
    hosts: Mapping[str, int],
    *,
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> list[Host]:
    """Return the hosts of a run, and the slots of each, in the hostfile's order.

    Args:
        hosts: number of slots of each host.
        include: the hosts and slots to use, as `NAME[:SLOT[,SLOT...]][@NAME...]`; a name alone means all of its slots.
        exclude: those not to use, in the same form.
        num_nodes: use so many hosts, from the first.
        num_gpus: use so many slots of each host, from the first.

    Raises:
        LaunchError: if both are given, a host or slot is not there, or nothing is left.

    Example:
        >>> select_hosts({"worker-0": 2, "worker-1": 4}, include="worker-0@worker-1:0,2")
        [Host(name='worker-0', slots=(0, 1)), Host(name='worker-1', slots=(0, 2))]
        >>> select_hosts({"worker-0": 2, "worker-1": 4}, exclude="worker-1:0")[1]
        Host(name='worker-1', slots=(1, 2, 3))
    """
    if include and exclude:
        raise LaunchError("--include and --exclude cannot be given together; give the one that is shorter to write")
    if (include or exclude) and (num_nodes is not None or num_gpus is not None):
        raise LaunchError(
            "--num_nodes and --num_gpus cannot be given together with --include or --exclude; "
            "leave them out, and name the hosts and slots"
        )
    chosen = {name: tuple(range(num_slots)) for name, num_slots in hosts.items()}
    if include:
        named = _parse_filter(include, hosts, "--include")
        chosen = {name: named[name] or slots for name, slots in chosen.items() if name in named}
    elif exclude:
        named = _parse_filter(exclude, hosts, "--exclude")
        chosen = {name: _without(slots, named.get(name)) for name, slots in chosen.items()}
        chosen = {name: slots for name, slots in chosen.items() if slots}
        if not chosen:
            raise LaunchError(f"--exclude {exclude} leaves no host; there are {', '.join(hosts)}")
    if num_nodes is not None:
        if not 1 <= num_nodes <= len(hosts):
            raise LaunchError(f"--num_nodes {num_nodes} must be between 1 and {len(hosts)}, the number of hosts")
        chosen = dict(list(chosen.items())[:num_nodes])
    if num_gpus is not None:
        smallest = min(chosen, key=lambda name: len(chosen[name]))
        if not 1 <= num_gpus <= len(chosen[smallest]):
            raise LaunchError(
                f"--num_gpus {num_gpus} must be between 1 and {len(chosen[smallest])}, the slots of {smallest}"
            )
        chosen = {name: slots[:num_gpus] for name, slots in chosen.items()}
    return [Host(name, slots) for name, slots in chosen.items()]


def _parse_filter(text: str, hosts: Mapping[str, int], option: str) -> dict[str, tuple[int, ...]]:
    """Slots of each host that a filter names, in ascending order; empty where the host is named as a whole."""
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.partition(":")
        if name not in hosts:
            near = closest(name, list(hosts))
            raise LaunchError(
                f"{option} {_show(text)}: the hostfile has no host {_show(name)}"
                + (f"; did you mean {near}?" if near else f"; it has {', '.join(hosts)}")
            )
        slots = {_parse_slot(number, f"{option} {_show(text)}") for number in numbers.split(",")} if colon else set()
        if name in named and bool(named[name]) != bool(slots):
            raise LaunchError(f"{option} {_show(text)}: names {name} once as a whole and once by its slots; give one")
        for slot in slots:
            if slot >= hosts[name]:
                raise LaunchError(
                    f"{option} {_show(text)}: {name} has no slot {slot}; its slots are 0 to {hosts[name] - 1}"
                )
        named.setdefault(name, set()).update(slots)
    return {name: tuple(sorted(slots)) for name, slots in named.items()}


def _parse_slot(number: str, where: str) -> int:
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", number):
        raise LaunchError(f"{where}: {_show(number)} is no slot; write numbers, as in worker-1:0,2")
    return int(number)


def _without(slots: Sequence[int], excluded: Sequence[int] | None) -> tuple[int, ...]:
    if excluded is None:
        return tuple(slots)
    return tuple(slot for slot in slots if excluded and slot not in excluded)


def check_address(address: str, option: str) -> None:
    """Check that an address, or the name of a host, is one, and no option of the programs that are given it.

    Raises:
        LaunchError: if it is not.
    """
    if not (_NAME.fullmatch(address) or re.fullmatch(r"[0-9A-Fa-f:]+[0-9A-Fa-f.]*", address)):
        raise LaunchError(f"{option} {_show(address)} is no address; give one such as 10.0.0.1, or the name of a host")


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise LaunchError(
            f"{where}: {_show(name)} is no host name; use letters, digits, dots, dashes and underscores, and name "
            "users and ports in ssh's own configuration (~/.ssh/config)"
        )


def _show(text: str) -> str:
    """The text, shortened, and without characters that would move a terminal's cursor."""
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return repr(short)
