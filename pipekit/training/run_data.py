"""The data of a run of layers, as one rank reads them: training samples, held-out ones, and a position among them."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import partial

from pipekit.config.growth import batch_size_at, samples_of_steps
from pipekit.data.batch_loader import BatchLoader
from pipekit.data.collate import MapDataset
from pipekit.data.mixture import Mixture, MixtureOrder, MixtureState, Phase
from pipekit.data.order import SampleOrder
from pipekit.data.prefetch import Prefetcher
from pipekit.data.truncate import truncate_sequences
from pipekit.data.workers import Workers
from pipekit.distributed.processes import gather_objects, run_together
from pipekit.engine.micro_batches import MicroBatch
from pipekit.errors import ConfigError, PipekitError
from pipekit.training.layers_trial import LayersTrial


class RunData:
    """Reads the training samples of a run, ahead of its steps, and its held-out ones. Every rank builds one together.

    Args:
        hooks: gives the datasets.

    Attributes:
        consumed_samples: position in the training data.
        waited_s: time for which steps have waited for samples since it was set to 0.
    """

    def __init__(self, hooks: LayersTrial) -> None:
        self._run = hooks.context
        self._config = self._run.config
        self._hooks = hooks
        self._train: Prefetcher | None = None
        self._held_out: dict[str, Prefetcher] = {}
        self.consumed_samples = 0
        self.waited_s = 0.0
        own = run_together(self._build)
        # Ranks between the first and the last stage read nothing, and report and save like the others.
        mixture, names = next(each for each in gather_objects(own) if each is not None)
        self._mixture: Mixture | None = mixture
        self._order: MixtureOrder | None = None
        self.validation_shares = _shares(self._mixture, names)
        self.go_on(0, 0, None)

    def _build(self) -> tuple[Mixture | None, list[str]] | None:
        hooks, config = self._hooks, self._config
        if not self._run.mpu.should_build_data_loader:
            return None
        dataset = self._checked(hooks.build_train_dataset(), "build_train_dataset")
        loader = self._loader(dataset, shuffle=config.data.shuffle)
        if config.train.batch_warmup is not None:
            loader.batch_size_at = partial(batch_size_at, config.train)
        workers = None
        if config.data.workers:
            workers = Workers(loader, config.data.workers, timeout_s=config.run.timeout_s)
        is_on_gpu = self._run.device.type == "cuda"
        self._train = Prefetcher(loader, pin_memory=is_on_gpu, workers=workers)
        if config.train.eval_interval is not None:
            held_out = hooks.build_validation_dataset()
            if held_out is None:
                raise PipekitError(
                    f"train.eval_interval={config.train.eval_interval}: {type(hooks).__name__} has no validation data; "
                    "set it to null, or return a dataset from build_validation_dataset"
                )
            for name, samples in (held_out if isinstance(held_out, Mapping) else {"": held_out}).items():
                self._checked(samples, "build_validation_dataset")
                self._held_out[name] = Prefetcher(self._loader(samples, shuffle=False), pin_memory=is_on_gpu)
        return hooks.build_mixture(dataset), [*self._held_out]

    def _checked(self, dataset: MapDataset, method: str) -> MapDataset:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise PipekitError(
                f"{type(self._hooks).__name__}.{method} returned a {type(dataset).__name__}, which "
                "lacks __len__ or __getitem__; return a map-style dataset, or write a pipekit.Trial, which takes others"
            )
        return dataset

    def _loader(self, dataset: MapDataset, *, shuffle: bool) -> BatchLoader:
        batch = self._run.plan.batch
        return BatchLoader(
            dataset,
            SampleOrder(len(dataset), self._config.train.seed, shuffle=shuffle),
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            dp_rank=self._run.mpu.data_parallel_rank,
            dp=batch.dp,
        )

    def go_on(self, step: int, consumed_samples: int, state: MixtureState | None) -> None:
        """Go on after `step` steps from a position, at which a mixture had `state`.

        Raises:
            ConfigError: if the sources of a mixture give less than the run still needs.
            CheckpointError: if a source has changed since.
        """
        self.consumed_samples = consumed_samples
        if self._mixture is not None:
            phase = None if state is None else self._mixture.phase_of(state, consumed_samples)
            self._set_order(self._mixture, step, phase)

    def skip_to(self, step: int, consumed_samples: int) -> None:
        """Go on after `step` steps from a later position than they have consumed."""
        self.consumed_samples = consumed_samples
        if self._mixture is not None and self._order is not None:
            self._set_order(self._mixture, step, self._order.phase_at(consumed_samples))

    def _set_order(self, mixture: Mixture, step: int, phase: Phase | None) -> None:
        train, position = self._config.train, self.consumed_samples
        samples_of = partial(samples_of_steps, train, position=position)
        order = mixture.order(step=step, position=position, batch_size=samples_of, phase=phase)
        left = max(0, train.steps - step)
        if position + samples_of(left) > order.end:
            last = step - 1 + bisect_right(range(left + 1), order.end - position, key=samples_of)
            remedy = f"train.steps={last}, or " if last else ""
            raise ConfigError(
                f"train.steps={train.steps}: the sources of data.mixture give samples for {last} steps within their "
                f"epochs; try {remedy}more epochs in data.mixture"
            )
        self._order = order
        if self._train is not None:
            self._train.set_order(order)

    def state(self) -> MixtureState | None:
        """Return the state of a mixture at the position, for a checkpoint; None without one."""
        return None if self._order is None else self._order.state(self.consumed_samples)

    def metrics(self, position: int) -> dict[str, float]:
        """Return metrics of each source of a mixture: its samples before a position, and the epochs that they make."""
        if self._order is None:
            return {}
        counts = self._order.counts(position)
        sizes = {source.name: source.num_samples for source in self._order.sources}
        return {f"samples/{name}": count for name, count in counts.items()} | {
            f"epochs/{name}": count / sizes[name] for name, count in counts.items()
        }

    def read(self, then: int | None, *, length: int | None = None) -> Iterator[MicroBatch] | None:
        """Return the micro-batches at the position, on ranks that read; those at `then` are read meanwhile.

        Args:
            then: the position of the next step; None where there is none.
            length: tokens of each sequence to keep; None keeps all.
        """
        started_s = time.perf_counter()
        batches = _batches(self._train, self.consumed_samples, then)
        self.waited_s += time.perf_counter() - started_s
        longest = self._config.train.sequence_length
        if batches is None or length in (None, longest):
            return batches
        assert length is not None
        return (truncate_sequences(batch, length, longest=longest) for batch in batches)

    def read_held_out(self, name: str, batch: int, *, is_last: bool) -> Iterator[MicroBatch] | None:
        """Return the micro-batches of a global batch of the held-out samples of a source, on ranks that read."""
        size = self._config.train.global_batch_size
        return _batches(self._held_out.get(name), batch * size, None if is_last else (batch + 1) * size)

    def close(self) -> None:
        """End threads and processes."""
        for prefetcher in (self._train, *self._held_out.values()):
            if prefetcher is not None:
                prefetcher.close()


def _batches(prefetcher: Prefetcher | None, position: int, then: int | None) -> Iterator[MicroBatch] | None:
    return None if prefetcher is None else iter(prefetcher.step_batches(position, then=then))


def _shares(mixture: Mixture | None, names: list[str]) -> dict[str, float]:
    """Weight of the held-out loss of each source in their mean: that of the source at the start of the run."""
    weights = dict.fromkeys(names, 1)
    if mixture is not None:
        begun = {source.name: weight for source, weight in zip(mixture.sources, mixture.stages[0][1], strict=True)}
        if any(begun[name] for name in names):
            weights = {name: begun[name] for name in names}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
