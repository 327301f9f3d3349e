"""Measured pipelines: the emulated pipelines and the GPT, with everybody who takes part in each.

Nothing here needs torch, so that the command answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, ClassVar, Literal

from pipekit.partitioners import partition_uniform
from pipekit.schedules import Costs, Schedule, default_stages_per_rank, plan_schedule, simulate
from pipelines.turns import Contender, System

if TYPE_CHECKING:
    from pipelines.workload import Workload

Precision = Literal["fp32", "bf16"]

TORCH_V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")
"""Torch's schedules of two stages a rank that go down the ranks and back up."""
TORCH_SCHEDULES = ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", *TORCH_V_SCHEDULES)


def plan_table(schedule: str, *, pp: int, num_micro_batches: int, costs: Costs | None = None) -> Schedule:
    """Return the table of one of our schedules, written `name`, `name:stages on each rank` or `name:stages:memory`.

    The memory is that of the activations that a rank may hold, in those of 1F1B's first rank; `auto` alone takes it.
    """
    name, stages_per_rank, _ = _parse(schedule)
    return plan_schedule(
        name,
        pp=pp,
        num_micro_batches=num_micro_batches,
        stages_per_rank=stages_per_rank,
        costs=costs,
        max_in_flight=max_in_flight(schedule, pp=pp),
    )


def max_in_flight(schedule: str, *, pp: int) -> int | None:
    """Stage activations that a rank may hold under one of our schedules; None where it cannot be told."""
    name, stages_per_rank, memory = _parse(schedule)
    return round(memory * pp * stages_per_rank) if name == "auto" else None


def _parse(schedule: str) -> tuple[str, int, float]:
    name, *rest = schedule.split(":")
    stages_per_rank = int(rest[0]) if rest else default_stages_per_rank(name)
    return name, stages_per_rank, float(rest[1]) if len(rest) > 1 else 1.0


@dataclass(frozen=True)
class EmulatedSetting:
    """Layers that sleep in place of computing, so that many ranks measure truly on a few cores.

    The model has two equal layers for each rank. Schedules of one stage a rank put both into it, those of two stages
    one into each.

    Attributes:
        pp: number of ranks.
        num_micro_batches: micro-batches of a step.
        forward_s: of a rank's layers for one micro-batch; the input gradient and the weight gradient take as long each.
        overhead_s: what a rank spends on an action beside sleeping, as calibrated on this machine.
        transfer_s: how long a message takes from rank to rank, likewise.
    """

    pp: int
    num_micro_batches: int
    forward_s: float
    overhead_s: float = 0.0
    transfer_s: float = 0.0

    teams: ClassVar[tuple[tuple[System, ...], ...]] = (("DeepSpeed", "torch", "pipekit"),)
    """The systems that share processes."""

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return f"pp{self.pp}-{1000 * self.forward_s:.0f}ms"

    def __str__(self) -> str:
        forward_ms = 1000 * self.forward_s
        return f"pp={self.pp}, {self.num_micro_batches} micro-batches, {forward_ms:.0f}/{2 * forward_ms:.0f} ms"

    @property
    def work_s(self) -> float:
        """Seconds for which each rank sleeps in a step, whatever the schedule."""
        return self.num_micro_batches * 3 * self.forward_s

    def contenders(self, schedules: Sequence[str]) -> list[Contender]:
        """Return raw DeepSpeed, torch's schedules, and ours with each of `schedules`."""
        num_layers = 2 * self.pp
        found = [Contender("DeepSpeed", "1f1b", "uniform")]
        for name in TORCH_SCHEDULES:
            num_stages = self.pp if name == "1F1B" else num_layers
            found.append(Contender("torch", name, boundaries=tuple(partition_uniform(num_layers, num_stages))))
        for schedule in schedules:
            _, stages_per_rank, _ = _parse(schedule)
            num_stages = self.pp * stages_per_rank
            table = plan_table(
                schedule, pp=self.pp, num_micro_batches=self.num_micro_batches, costs=self._costs(num_stages)
            )
            boundaries = tuple(partition_uniform(num_layers, num_stages))
            found.append(Contender("pipekit", schedule, boundaries=boundaries, table=table))
        return found

    def simulated_s(self, contender: Contender) -> float:
        """Return the step time that our simulator gives for one of ours.

        It knows how long the layers sleep, and what was calibrated on another schedule.
        """
        assert contender.table is not None
        return simulate(contender.table, self._costs(contender.table.num_stages)).step_time_s

    def _costs(self, num_stages: int) -> Costs:
        seconds = self.forward_s * self.pp / num_stages
        return Costs.uniform(
            num_stages,
            forward_s=seconds,
            input_gradient_s=seconds,
            weight_gradient_s=seconds,
            overhead_s=self.overhead_s,
            transfer_s=self.transfer_s,
        )

    def calibrated(self, measured: Costs) -> EmulatedSetting:
        """Return the setting with the latencies of a machine on which 1F1B's actions were measured."""
        beside_sleep_s = median(measured.forward_s) - self.forward_s
        return replace(self, overhead_s=measured.overhead_s + beside_sleep_s, transfer_s=measured.transfer_s)

    def build_workload(self) -> Workload:
        """Build the layers and the batch; needs torch."""
        from pipelines.sleeping import build_sleeping_workload

        return build_sleeping_workload(self)


EMULATED_SETTINGS = tuple(
    EmulatedSetting(pp, num_micro_batches, forward_s)
    for pp, num_micro_batches in ((4, 8), (8, 16))
    for forward_s in (0.02, 0.05)
)


@dataclass(frozen=True)
class GPTSetting:
    """A GPT of eight blocks on two ranks, one thread each: ZeRO-1 and AdamW, torch with its plain AdamW.

    Its layers are token embedding 0, position embedding 1, attention and MLP half of the blocks 2 to 17, final norm 18,
    head 19.

    Attributes:
        precision: of weights and activations; in bf16 DeepSpeed and ours update fp32 weights, torch its bf16 ones.
        family: what the command line calls it, before the precision.
        micro_batch_size: sequences of a micro-batch.
        hidden_size: its width.
        num_heads: attention heads.
        vocab_size: tokens that the embedding and the head know; they share no weights.
        sequence_length: tokens of a sequence.
    """

    precision: Precision
    family: str = "gpt"
    micro_batch_size: int = 4
    hidden_size: int = 384
    num_heads: int = 6
    vocab_size: int = 4096
    sequence_length: int = 256

    teams: ClassVar[tuple[tuple[System, ...], ...]] = (("DeepSpeed", "torch"), ("pipekit", "limit"))
    pp = 2
    num_micro_batches = 8
    num_blocks = 8

    torch_cuts = ((11,), (10,))
    """Cuts into two stages for torch, the most even one, which ours and the limit have too, first."""

    quarters = (5, 10, 14)
    """The cut into four stages, for schedules that put two on each rank."""

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return f"{self.family}-{self.precision}"

    def __str__(self) -> str:
        sizes = f"width {self.hidden_size}, vocabulary {self.vocab_size:,}"
        return f"GPT, {sizes}, pp={self.pp}, {self.num_micro_batches} micro-batches, {self.precision}"

    def contenders(self, schedules: Sequence[str], *, num_cuts: int | None = None) -> list[Contender]:
        """Return raw DeepSpeed with each partition, torch with the first of its cuts, ours, and the limit."""
        found = [Contender("DeepSpeed", "1f1b", partition) for partition in ("parameters", "uniform")]
        found += [Contender("torch", "1F1B", *self._cut(cut)) for cut in self.torch_cuts[:num_cuts]]
        even = self.torch_cuts[0]
        for schedule in schedules:
            name, stages_per_rank, _ = _parse(schedule)
            table = plan_table(schedule, pp=self.pp, num_micro_batches=self.num_micro_batches)
            cut = self._cut(even if stages_per_rank == 1 else self.quarters)
            found.append(Contender("pipekit", schedule, *cut, table, measures_costs=name == "auto"))
        return [*found, Contender("limit", "", *self._cut(even))]

    def _cut(self, cut: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Return what a cut is called, and its boundaries."""
        return ",".join(map(str, cut)), (0, *cut, 2 * self.num_blocks + 4)

    def build_workload(self) -> Workload:
        """Build the specs and the batch; needs torch."""
        from pipelines.gpt import build_gpt_workload

        return build_gpt_workload(self)


GPT_SETTINGS = (GPTSetting("fp32"), GPTSetting("bf16"))

BIG_VOCABULARY = GPTSetting(
    "fp32",
    family="big-vocabulary",
    micro_batch_size=2,
    vocab_size=50_257,
    sequence_length=128,
)
"""The same GPT with GPT-2's own vocabulary: its head costs as much as ten of its blocks."""

Setting = EmulatedSetting | GPTSetting
SETTINGS: tuple[Setting, ...] = (*EMULATED_SETTINGS, *GPT_SETTINGS)
