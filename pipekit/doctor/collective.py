"""Verdicts on the speed of messages between ranks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pipekit.doctor.rows import Row
from pipekit.launch.collective_rank import read_speed

LIMIT_S = 30
"""Longest time in seconds that a rank waits for another."""

# Limits below which bytes per second, and above which seconds, count as slow: by backend, and by whether all ranks are
# on one machine.
_FEW_BYTES_PER_S = {("gloo", True): 0.1e9, ("nccl", True): 2e9, ("gloo", False): 0.05e9, ("nccl", False): 1e9}
_LONG_S = {True: 0.01, False: 0.02}


@dataclass(frozen=True)
class CollectiveSpeed:
    """Speed of messages between ranks, as `pipekit.distributed.collective_speed` measures it.

    Attributes:
        backend: "gloo" or "nccl".
        world_size: number of ranks.
        is_right: whether all ranks received the right numbers.
        hosts: host name of each rank.
        times: for each operation, "all-reduce" and "send", pairs of bytes and the seconds of the slowest rank.
    """

    backend: str
    world_size: int
    is_right: bool
    hosts: Sequence[str] = ()
    times: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def bytes_per_s(self, operation: str) -> float:
        """Bytes that a rank sends per second, at the fastest message size.

        In an all-reduce of n bytes among p ranks, each rank sends 2 (p - 1) / p * n bytes.

        Example:
            >>> CollectiveSpeed("gloo", 2, True, times={"all-reduce": [(1000, 0.5)]}).bytes_per_s("all-reduce")
            2000.0
        """
        share = 2 * (self.world_size - 1) / self.world_size if operation == "all-reduce" else 1.0
        return max(share * size / seconds for size, seconds in self.times[operation])


def judge_output(title: str, output: str, *, on_one_machine: bool) -> list[Row]:
    """Rows of the speed that rank 0 reports in its output, or one row if it reports none."""
    speed = read_speed(output)
    if speed is None:
        return [judge_failure(title, "the ranks ended without a result", on_one_machine=on_one_machine)]
    return judge_speed(title, CollectiveSpeed(**speed), on_one_machine=on_one_machine)


def judge_speed(title: str, speed: CollectiveSpeed, *, on_one_machine: bool) -> list[Row]:
    """Rows of the speed of messages: one per operation, with its times by message size."""
    if not speed.is_right:
        advice = "Faulty memory, a network adapter or a driver corrupts data; find the cause before you train here."
        return [Row(title, "bad", "ranks received wrong numbers", advice, asdict(speed))]
    if speed.world_size == 1:
        return [Row(title, "ok", "starts, but there is no other rank to send to", measured=asdict(speed))]
    rows = []
    for operation, times in speed.times.items():
        by_size = ", ".join(f"{_size_text(size)} in {1000 * seconds:.2g} ms" for size, seconds in times)
        text = f"{speed.bytes_per_s(operation) / 1e9:.2f} GB/s; {by_size}"
        few = speed.bytes_per_s(operation) < _FEW_BYTES_PER_S[(speed.backend, on_one_machine)]
        measured = {**asdict(speed), "operation": operation, "bytes_per_s": speed.bytes_per_s(operation)}
        name = f"{title}: {operation}"
        if few or times[0][1] > _LONG_S[on_one_machine]:
            advice = _advice_if_slow(speed.backend, on_one_machine=on_one_machine)
            rows.append(Row(name, "warning", f"{text}: slow", advice, measured))
        else:
            rows.append(Row(name, "ok", text, measured=measured))
    return rows


def judge_failure(title: str, message: str, *, on_one_machine: bool) -> Row:
    """Row of ranks that could not exchange messages."""
    if on_one_machine:
        advice = "The rows above may show why; set NCCL_DEBUG=INFO or TORCH_CPP_LOG_LEVEL=INFO for details."
    else:
        advice = (
            "Make sure that the hosts reach each other on all ports, not only by ssh, and give --master_addr if the "
            "first host has several addresses."
        )
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return Row(title, "bad", " ".join(lines[:2]), advice)


def _advice_if_slow(backend: str, *, on_one_machine: bool) -> str:
    if not on_one_machine:
        return (
            "Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface of the fast network. Pipeline parallelism "
            "sends the least between hosts."
        )
    if backend == "nccl":
        return "nvidia-smi topo -m shows how the GPUs are connected; NCCL_DEBUG=INFO shows what NCCL uses."
    return "Other programs may use the machine's cores; check top and the limits of the container."


def _size_text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
