"""Hostfiles and filters of hosts: as DeepSpeed reads them, and where we refuse what it takes silently."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.errors import LaunchError
from pipekit.launch.hosts import Host, check_address, parse_hostfile, read_hostfile, select_hosts

POOL = {"worker-0": 2, "worker-1": 4, "worker-2": 1}

# Valid and not, by every rule of the syntax.
FILTERS = [
    "worker-0",
    "worker-1:0,2",
    "worker-0@worker-1:0,2",
    "worker-1:2,0",
    "worker-1:0@worker-0",
    "worker-1:3@worker-1:1",
    "worker-1:1,1",
    "worker-1: 0, 2",
    "worker-1:01",
    "worker-0@worker-0",
    "worker-2@worker-1@worker-0",
    "worker-0:0@worker-1:0,1,2,3",
    "worker-1:4",
    "worker-1:-1",
    "worker-1:",
    "worker-1:0,",
    "worker-1:a",
    "worker-1:0:1",
    "worker-1:0.5",
    "worker-3",
    "worker-3:0",
    "worker-0,worker-1",
    "worker-0 ",
    " worker-0",
    "worker-0@",
    "@",
    "@worker-0",
    ":",
    ":0",
]

# Taken by DeepSpeed without a word, and why we refuse it.
REFUSED_FILTERS = {
    "worker-1@worker-1:0": "once as a whole and once by its slots",
    "worker-1:+1": "is no slot",
    "worker-1:0_1": "is no slot",
    "worker-1:\u0661": "is no slot",
}


def theirs(hosts: dict[str, int], include: str = "", exclude: str = "") -> dict[str, list[int]] | None:
    """Hosts and slots that DeepSpeed selects by a filter; None if it refuses the filter."""
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    try:
        return dict(parse_inclusion_exclusion(hosts, include, exclude))
    except ValueError:
        return None


def ours(hosts: dict[str, int], include: str = "", exclude: str = "") -> dict[str, list[int]] | None:
    try:
        return {host.name: list(host.slots) for host in select_hosts(hosts, include=include, exclude=exclude)}
    except LaunchError:
        return None


@pytest.mark.parametrize("text", FILTERS)
def test_filters_are_read_as_by_deepspeed(text: str) -> None:
    assert ours(POOL, include=text) == theirs(POOL, include=text)
    assert ours(POOL, exclude=text) == (theirs(POOL, exclude=text) or None)
    if (found := ours(POOL, include=text)) is not None:
        assert list(found) == [name for name in POOL if name in found]  # ranks are counted in the hostfile's order


@pytest.mark.parametrize("text", REFUSED_FILTERS)
def test_filters_that_deepspeed_takes_silently_are_refused(text: str) -> None:
    assert theirs(POOL, include=text) is not None
    with pytest.raises(LaunchError, match=REFUSED_FILTERS[text]):
        select_hosts(POOL, include=text)


_names = st.sampled_from(["a", "b", "c", "node-1", "node-2"])
_slots = st.lists(st.integers(-1, 5).map(str) | st.sampled_from(["", "x", " 1"]), min_size=1, max_size=4)
_nodes = st.tuples(_names, st.none() | _slots).map(lambda node: node[0] + (":" + ",".join(node[1]) if node[1] else ""))
_filters = st.lists(_nodes, min_size=1, max_size=4).map("@".join)
_pools = st.dictionaries(_names, st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(pool=_pools, text=_filters)
def test_made_up_filters_are_read_as_by_deepspeed(pool: dict[str, int], text: str) -> None:
    parts = [part.split(":") for part in text.split("@")]
    is_contradiction = any(one[0] == other[0] and len(one) != len(other) for one in parts for other in parts)
    for option in ("include", "exclude"):
        expected = None if is_contradiction else theirs(pool, **{option: text}) or None
        assert ours(pool, **{option: text}) == expected, option


@given(
    lines=st.lists(st.sampled_from(["a slots=1", " b\tslots=3 ", "# a", "", "a  slots=2", "c slots", "d slots = 1"]))
)
def test_hostfiles_are_read_as_by_deepspeed(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path_factory.getbasetemp() / "hostfile"
    path.write_text("\n".join(lines))
    try:
        expected = dict(fetch_hostfile(path))
    except ValueError:
        with pytest.raises(LaunchError, match="hostfile"):
            read_hostfile(path)
    else:
        assert read_hostfile(path) == expected
        assert list(read_hostfile(path)) == list(expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("worker-1 slots=4x", "line 2: 'worker-1 slots=4x' is no host and its slots; write worker-1 slots=4"),
        ("worker-1 slots=4 max_slots=8", "is no host and its slots"),
        ("worker-1 slots=0", "line 2: slots=0 must be between 1 and 1024"),
        ("worker-1 slots=999999999", "must be between 1 and 1024"),
        ("worker-1 slots=\u0664", "is no host and its slots"),
        ("-oProxyCommand=reboot slots=4", "is no host name"),
        ("me@worker-1 slots=4", "is no host name.*name users and ports in ssh's own configuration"),
        ("../worker slots=4", "is no host name"),
        ("$(reboot) slots=4", "is no host name"),
        ("a;b slots=4", "is no host name"),
        ("\x1b[2Jw slots=4", r"'\\x1b\[2Jw' is no host name"),
    ],
)
def test_lines_that_deepspeed_takes_silently_are_refused(line: str, message: str) -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    assert _parse_hostfile(["worker-0 slots=1\n", line])
    with pytest.raises(LaunchError, match=message):
        parse_hostfile(f"worker-0 slots=1\n{line}")


def test_a_comment_may_follow_a_host() -> None:
    assert parse_hostfile("worker-1 slots=4  # the old one\r\n") == {"worker-1": 4}


def test_errors_of_hostfiles_name_the_file_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=1\n\na slots=2\n")
    with pytest.raises(LaunchError, match=r"hosts, line 3: a stands in line 1 already"):
        read_hostfile(path)
    path.write_bytes(b"\xff")
    with pytest.raises(LaunchError, match="hosts: byte 0 is not UTF-8"):
        read_hostfile(path)
    path.write_text("# nobody\n")
    with pytest.raises(LaunchError, match="hosts: names no host"):
        read_hostfile(path)
    # DeepSpeed goes on without the hosts, on this machine alone.
    for nothing in (tmp_path / "missing", tmp_path, Path("/dev/zero")):
        with pytest.raises(LaunchError, match=r"is not a file|no such file"):
            read_hostfile(nothing)
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(LaunchError, match="no hostfile"):
        read_hostfile(path)


@pytest.mark.parametrize(("num_nodes", "num_gpus"), [(2, None), (None, 1), (1, 2), (3, 1)])
def test_counts_take_the_first_hosts_and_slots_as_deepspeed_does(num_nodes: int | None, num_gpus: int | None) -> None:
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, parse_inclusion_exclusion

    everything = parse_inclusion_exclusion(POOL, "", "")
    expected = apply_num_nodes_and_gpus(everything, num_nodes or -1, num_gpus or -1)
    chosen = select_hosts(POOL, num_nodes=num_nodes, num_gpus=num_gpus)
    assert {host.name: list(host.slots) for host in chosen} == dict(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "worker-0", "exclude": "worker-1"}, "cannot be given together"),
        ({"include": "worker-0", "num_nodes": 1}, "cannot be given together with --include"),
        ({"exclude": "worker-0", "num_gpus": 1}, "cannot be given together with --include or --exclude"),
        ({"exclude": "worker-0@worker-1@worker-2"}, "leaves no host; there are worker-0, worker-1, worker-2"),
        ({"include": "worker_1"}, "did you mean worker-1"),
        # DeepSpeed takes as many as there are, or starts more processes than there are slots.
        ({"num_nodes": 4}, "--num_nodes 4 must be between 1 and 3"),
        ({"num_gpus": 2}, "--num_gpus 2 must be between 1 and 1, the slots of worker-2"),
        ({"num_nodes": 0}, "--num_nodes 0 must be between 1 and 3"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        select_hosts(POOL, **options)  # type: ignore[arg-type]


def test_hosts_have_their_slots() -> None:
    assert select_hosts({"a": 2}) == [Host("a", (0, 1))]


def test_addresses_are_no_options() -> None:
    for address in ("10.0.0.1", "fe80::1", "node01.example.org"):
        check_address(address, "--master_addr")
    for address in ("-oX=y", "a b", "", "x;y"):
        with pytest.raises(LaunchError, match=r"--master_addr .* is no address"):
            check_address(address, "--master_addr")
