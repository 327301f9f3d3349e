"""Memory limit of a rank, for partitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipekit.errors import LayoutError
from pipekit.partitioners.local_search import StageSums
from pipekit.partitioners.prefix_sums import PrefixSums


@dataclass(frozen=True)
class MemoryLimit:
    """Memory of layers and stages, and the limit of a rank.

    A rank's memory is the sum over its stages of their layers' `state_bytes`, of `in_flight` times their layers'
    `activation_bytes`, and of `extra_bytes`.

    Attributes:
        state_bytes: bytes of each layer's parameters, gradients and optimizer states.
        activation_bytes: bytes that each layer holds per micro-batch between its forward and its backward.
        in_flight: number of micro-batches whose activations each stage holds at once.
        extra_bytes: bytes that each stage holds besides its layers.
        limit_bytes: memory limit of a rank.

    Example:
        >>> limit = MemoryLimit([8, 8, 8], [1, 1, 1], in_flight=[2, 1], extra_bytes=[0, 4], limit_bytes=24)
        >>> limit.rank_bytes([0, 2, 3], placement=(0, 1))
        [20, 13]
    """

    state_bytes: Sequence[int]
    activation_bytes: Sequence[int]
    in_flight: Sequence[int]
    extra_bytes: Sequence[int]
    limit_bytes: int

    def check(self, num_layers: int, num_stages: int) -> None:
        """Check that there is a number for every layer and every stage.

        Raises:
            LayoutError: if a number is missing or negative.
        """
        sizes = {"state_bytes": num_layers, "activation_bytes": num_layers}
        sizes |= {"in_flight": num_stages, "extra_bytes": num_stages}
        for name, size in sizes.items():
            numbers = getattr(self, name)
            if len(numbers) != size:
                kind = "layers" if name in ("state_bytes", "activation_bytes") else "stages"
                raise LayoutError(
                    f"MemoryLimit.{name} has {len(numbers)} entries, and must have one for each of the {size} {kind}"
                )
            if any(number < 0 for number in numbers):
                raise LayoutError(f"MemoryLimit.{name} holds {min(numbers)}; its entries must not be negative")

    def stage_sums(self) -> list[PrefixSums]:
        """Return, for each stage, sums of the bytes that the first 0, 1, ... layers would hold in it."""
        layers = [(int(state), int(held)) for state, held in zip(self.state_bytes, self.activation_bytes, strict=True)]
        made = {
            number: PrefixSums.of(state + number * held for state, held in layers)
            for number in map(int, set(self.in_flight))
        }
        return [made[int(number)] for number in self.in_flight]

    def held(self) -> StageSums:
        """Total bytes of all layers and stages."""
        return StageSums([sums.before for sums in self.stage_sums()], [int(extra) for extra in self.extra_bytes])

    def rank_bytes(self, boundaries: Sequence[int], placement: Sequence[int]) -> list[int]:
        """Bytes of every rank under a partition."""
        return self.held().ranks(boundaries, placement)

    def error(self, least_bytes: int, pp: int, *, is_least: bool = True) -> LayoutError:
        """Error for the case that no partition fits, with the excess and remedies.

        Args:
            least_bytes: smallest memory of the largest rank.
            pp: the number of pipeline ranks.
            is_least: whether no partition at all needs less, rather than no partition that was tried.
        """
        least = "the smallest possible" if is_least else "the smallest found"
        return LayoutError(
            f"the layers do not fit into the memory of parallel.pp={pp} ranks: {least} need of the largest rank is "
            f"{_shown(least_bytes)}, {_shown(least_bytes - self.limit_bytes)} more than the {_shown(self.limit_bytes)} "
            f"that it has; try a parallel.pp greater than {pp}, train.activation_checkpointing=true, or a smaller "
            "train.micro_batch_size"
        )


def _shown(num_bytes: int) -> str:
    return f"{num_bytes} bytes" if num_bytes < 10**6 else f"{num_bytes / 1e9:,.3f} GB"
