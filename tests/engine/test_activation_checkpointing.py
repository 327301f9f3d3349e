"""Activation checkpointing in each of its forms: losses to the bit, and the bytes that ranks hold against the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from engine_jobs import Case, build_engine, micro_batches, model_specs, train_steps
from gloo_workers import GlooWorkers
from pipekit.errors import ConfigError
from pipekit.layers.attention_core import recompute_attention
from pipekit.schedules import Action, default_stages_per_rank, schedule_placement
from pipekit.settings.activations import ActivationCheckpointing
from pipekit.tensor_parallel.kept_inputs import HostCopy, KeptInputs
from predictions.test_memory import Probe, noting_deferred, predicted

EVERY_SECOND = ActivationCheckpointing(every=2)
NAMED = ActivationCheckpointing(layers="blocks.*.mlp")
ATTENTION = ActivationCheckpointing(only="attention")
OFFLOADED = ActivationCheckpointing(offload=True)
PARTITIONED = ActivationCheckpointing(partition=True)
FORMS = [
    True,
    EVERY_SECOND,
    ATTENTION,
    OFFLOADED,
    PARTITIONED,
    ActivationCheckpointing(partition=True, offload=True),
]


def train_each(rank: int, case: Case, forms: list[Any]) -> list[tuple[list[float], list[float]]]:
    """Train under each form, over the same process groups, and return losses and gradient norms."""
    from pipekit.distributed.mpu import ModelParallelUnit
    from pipekit.layout import Layout

    placement = schedule_placement(case.schedule, pp=case.pp, stages_per_rank=default_stages_per_rank(case.schedule))
    unit = ModelParallelUnit(Layout(pp=case.pp, tp=case.tp), placement=placement)
    cases = [replace(case, checkpointing=form) for form in forms]
    return [train_steps(build_engine(each, unit=unit), each, each.steps) for each in cases]


def assert_all_alike(results: list[list[tuple[list[float], list[float]]]]) -> None:
    for plain, *others in results:
        assert all(other == plain for other in others)
    assert results[0][0][0][0] != results[0][0][0][1]


@pytest.mark.distributed
@pytest.mark.slow
def test_every_form_trains_as_none_does_to_the_bit(gloo: GlooWorkers) -> None:
    case = Case(pp=2, tp=2, schedule="zb-h1", sequence_parallel=False, dropout=0.2, steps=2, micro_batch_size=4)
    assert_all_alike(gloo.run(case.world_size, train_each, case, [False, *FORMS]))


class DeviceAndHost(Probe):
    """Counts the bytes on the device, those of inputs that are kept apart among them, and those in host memory."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._hosted: list[tuple[StorageWeakRef, int]] = []
        self.host = 0

    def stop(self, action: Action) -> None:
        super().stop(action)
        self.host = max(self.host, sum(size for storage, size in self._hosted if not storage.expired()))

    def note_piece(self, piece: Tensor | HostCopy) -> None:
        if isinstance(piece, Tensor):
            passed_on = self._passed_on
            self.keep(piece)
            # What the forward keeps is not what it passes on.
            self._passed_on = passed_on
            return
        storage = piece.host.untyped_storage()
        self._hosted.append((StorageWeakRef(storage), storage.nbytes()))


@contextmanager
def noting_pieces(probe: DeviceAndHost) -> Iterator[None]:
    pack = KeptInputs._pack

    def noted(self: KeptInputs, *args: Any) -> Any:
        kept = pack(self, *args)
        if not isinstance(kept, Tensor):
            probe.note_piece(kept.piece)
        return kept

    KeptInputs._pack = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        KeptInputs._pack = pack  # type: ignore[method-assign]


def measure_each(rank: int, cases: list[Case]) -> list[tuple[int, int, int]]:
    """Train two steps of each case, and return the pipeline rank and the bytes held in the second."""
    found = []
    for case in cases:
        engine = build_engine(case)
        engine.train_batch(micro_batches(0, case, engine.mpu.data_parallel_rank))
        probe = DeviceAndHost(engine)
        hooks = torch.autograd.graph.saved_tensors_hooks(probe.keep, lambda tensor: tensor)
        with hooks, noting_deferred(probe), noting_pieces(probe):
            engine.train_batch(micro_batches(1, case, engine.mpu.data_parallel_rank))
        found.append((engine.mpu.pipe_rank, probe.activations, probe.host))
    return found


def assert_held_as_planned(gloo: GlooWorkers, cases: list[Case]) -> None:
    planned = [predicted(case, recompute_attention(model_specs(case), case.checkpointing)) for case in cases]
    for results in gloo.run(cases[0].world_size, measure_each, cases):
        for case, (pipe_rank, activations, host), ranks in zip(cases, results, planned, strict=True):
            if case.tp > 1 and pipe_rank == case.pp - 1:
                continue  # Of the loss, each rank has a shard of its own.
            parts, recomputation = ranks[pipe_rank]
            assert activations == pytest.approx(parts.activations - recomputation, rel=0.02), case
            assert host == parts.host_activations, case


@pytest.mark.distributed
def test_ranks_hold_what_was_planned(gloo: GlooWorkers) -> None:
    forms = [EVERY_SECOND, NAMED, OFFLOADED, ATTENTION]
    cases = [Case(pp=2, tied=False, checkpointing=form) for form in forms]
    assert_held_as_planned(gloo, cases)
    whole, (without, _) = predicted(Case(pp=2, tied=False, checkpointing=True))[0], predicted(cases[2])[0]
    assert without.activations - predicted(cases[2])[0][1] < whole[0].activations - whole[1]
    assert without.host_activations > 0


@pytest.mark.distributed
@pytest.mark.slow
def test_tensor_parallel_ranks_hold_shards_of_inputs_as_planned(gloo: GlooWorkers) -> None:
    forms = [PARTITIONED, ActivationCheckpointing(partition=True, offload=True)]
    assert_held_as_planned(gloo, [Case(pp=2, tp=2, sequence_parallel=False, checkpointing=form) for form in forms])


def partition_alone(rank: int) -> str:
    with pytest.raises(ConfigError) as raised:
        build_engine(Case(checkpointing=PARTITIONED))
    return str(raised.value)


@pytest.mark.distributed
def test_one_rank_has_nothing_to_share_out(gloo: GlooWorkers) -> None:
    (message,) = gloo.run(1, partition_alone)
    assert message == (
        "train.activation_checkpointing.partition=true shares inputs out over tensor-parallel ranks, and there is one; "
        "leave it out"
    )
