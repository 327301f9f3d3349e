"""Messages that a sender keeps, and its waits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from engine_jobs import VOCAB, Case, build_engine, micro_batches
from gloo_workers import GlooWorkers
from pipekit.engine.channels import End, Receiver, Sender, encode_meta
from pipekit.layers.specs import LayerSpec
from pipekit.schedules import Action, Schedule, plan_1f1b, plan_schedule
from pipekit.schedules.acknowledgements import Acknowledgements, plan_acknowledgements
from pipekit.tensors.meta import NestedMeta, TensorMeta

NUM_MICRO_BATCHES = 8


@dataclass
class Work:
    """A send of which everybody knows whether it has been received; waiting for it otherwise, or twice, never ends."""

    tells: bool
    received: bool = False
    waited: bool = False

    def is_completed(self) -> bool:
        return self.waited or (self.tells and self.received)

    def wait(self) -> None:
        assert self.received, "waits for ever: the receiver has not asked for it"
        assert not self.waited, "waits for ever: it was waited for before"
        self.waited = True


@dataclass
class Group:
    """A process group that sends nothing; `tells` as on NCCL, where a send is known to be complete without a wait."""

    tells: bool = False
    works: list[Work] = field(default_factory=list)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        self.works.append(Work(self.tells))
        return self.works[-1]


def build_sender(group: Group, header_group: Group) -> Sender:
    return Sender(peer=1, end=End(group, 1), header_end=End(header_group, 1))  # type: ignore[arg-type]


def forward(micro_batch: int) -> Action:
    return Action(0, "F", micro_batch)


def send(sender: Sender, micro_batch: int, *, header: Tensor | None = None) -> StorageWeakRef:
    tensor = torch.full((4,), float(micro_batch))
    sender.send(forward(micro_batch), [tensor], header=header)
    return StorageWeakRef(tensor.untyped_storage())


def start() -> tuple[Sender, Group, Group]:
    group, headers = Group(), Group()
    sender = build_sender(group, headers)
    sender.start(plan_acknowledgements(plan_1f1b(num_stages=2, num_micro_batches=4), 0)[1])
    return sender, group, headers


def test_an_answer_frees_what_it_proves_and_waits_for_nothing_else() -> None:
    sender, group, headers = start()
    alive = [send(sender, 0, header=torch.zeros(8)), send(sender, 1), send(sender, 2)]
    group.works[0].received = headers.works[0].received = group.works[1].received = True
    sender.release(Action(1, "B", 1))
    assert [storage.expired() for storage in alive] == [True, True, False]
    assert [work.waited for work in group.works] == [True, True, False]
    assert headers.works[0].waited
    # An answer that was overtaken proves nothing more.
    sender.release(Action(1, "B", 0))
    group.works[2].received = True
    sender.drain()
    assert alive[2].expired()
    assert all(work.waited for work in group.works)


def test_what_a_failed_step_left_is_not_taken_for_what_was_sent_again() -> None:
    sender, group, _ = start()
    left = send(sender, 0)
    sender.start(plan_acknowledgements(plan_1f1b(num_stages=2, num_micro_batches=4), 0)[1])
    again = send(sender, 0)
    group.works[1].received = True
    sender.release(Action(1, "B", 0))
    assert (left.expired(), again.expired()) == (False, True)
    group.works[0].received = True
    sender.drain()
    assert left.expired()


def test_sends_that_tell_that_they_are_done_are_dropped_at_the_next() -> None:
    group = Group(tells=True)
    sender = build_sender(group, Group())
    sender.start(Acknowledgements((), {}))
    first = send(sender, 0)
    group.works[0].received = True
    second = send(sender, 1)
    assert (first.expired(), second.expired()) == (True, False)
    assert not group.works[0].waited


def kept_at_most(schedule: Schedule, rank: int, peer: int) -> int:
    """Largest number of messages that a rank has sent and that are not yet confirmed to be received."""
    acknowledgements = plan_acknowledgements(schedule, rank)[peer]
    split = schedule.split_backwards
    kept: set[Action] = set()
    peak = 0
    for action in schedule.ranks[rank]:
        stage, micro_batch = action.stage, action.micro_batch
        behind = Action(stage + 1, "I" if (stage + 1, micro_batch) in split else "B", micro_batch)
        answer = Action(stage - 1, "F", micro_batch) if action.kind == "F" else behind
        if action.kind != "W" and answer in acknowledgements.confirmed:
            kept -= set(acknowledgements.used[: acknowledgements.confirmed[answer]])
        if action in acknowledgements.used:
            kept.add(action)
            peak = max(peak, len(kept))
    return peak


def linear_specs() -> list[LayerSpec]:
    """Four layers whose weight gradients keep no input gradient."""
    width = 32
    layers = [LayerSpec(nn.Linear, width, width) for _ in range(2)]
    return [LayerSpec(nn.Embedding, VOCAB, width), *layers, LayerSpec(nn.Linear, width, VOCAB)]


def count_alive(rank: int, case: Case, evaluate: bool) -> dict[tuple[int, str], int]:
    """Peak number of messages that this rank held, by the rank that it sent them to and the kind of action."""
    engine = build_engine(case, specs=linear_specs())
    engine.train_batch(micro_batches(0, case, 0))
    sent: dict[tuple[int, str], list[StorageWeakRef]] = {}
    peaks: dict[tuple[int, str], int] = {}
    original = Sender.send

    def watch(self: Sender, action: Action, tensors: Any, **options: Any) -> None:
        (tensor,) = tensors
        storages = sent.setdefault((self._peer, action.kind), [])
        storages.append(StorageWeakRef(tensor.untyped_storage()))
        del tensor
        original(self, action, tensors, **options)
        alive = sum(not storage.expired() for storage in storages)
        peaks[self._peer, action.kind] = max(peaks.get((self._peer, action.kind), 0), alive)

    Sender.send = watch  # type: ignore[method-assign]
    try:
        if evaluate:
            engine.eval_batch(micro_batches(1, case, 0))
        else:
            engine.train_batch(micro_batches(1, case, 0))
    finally:
        Sender.send = original  # type: ignore[method-assign]
    assert all(storage.expired() for storages in sent.values() for storage in storages)
    assert all(len(storages) % NUM_MICRO_BATCHES == 0 for storages in sent.values())
    return peaks


@pytest.mark.distributed
@pytest.mark.parametrize("pp", [2, 4])
def test_no_more_activations_are_kept_than_are_in_flight(gloo: GlooWorkers, pp: int) -> None:
    schedule = plan_schedule("1f1b", pp=pp, num_micro_batches=NUM_MICRO_BATCHES)
    for rank, peaks in enumerate(gloo.run(pp, count_alive, Case(pp=pp), False)[:-1]):
        # Besides those in flight, the one that was sent last.
        assert peaks[rank + 1, "F"] <= schedule.peak_in_flight(rank) + 1 < NUM_MICRO_BATCHES


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "pp"), [("1f1b", 2), ("zb-h1", 2), ("zb-h1", 4)])
def test_no_more_gradients_are_kept_than_the_table_leaves_unproved(gloo: GlooWorkers, name: str, pp: int) -> None:
    schedule = plan_schedule(name, pp=pp, num_micro_batches=NUM_MICRO_BATCHES)
    kind = "B" if name == "1f1b" else "I"
    for rank, peaks in enumerate(gloo.run(pp, count_alive, Case(pp=pp, schedule=name), False)):
        if rank > 0:
            assert peaks[rank - 1, kind] <= kept_at_most(schedule, rank, rank - 1) < NUM_MICRO_BATCHES


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_nothing_outlives_an_evaluation(gloo: GlooWorkers, name: str) -> None:
    peaks, _ = gloo.run(2, count_alive, Case(pp=2, schedule=name), True)
    assert {kind for _, kind in peaks} == {"F"}


class OneHot(nn.Module):
    """Passes on what needs no gradient."""

    def forward(self, token_ids: Tensor) -> Tensor:
        return nn.functional.one_hot(token_ids, VOCAB).float()


def train_without_gradients_below(rank: int, schedule: str, pp: int) -> list[float]:
    case = Case(pp=pp, zero=0, schedule=schedule)
    layers = [LayerSpec(nn.Linear, VOCAB, VOCAB) for _ in range(3)]
    engine = build_engine(case, specs=[LayerSpec(OneHot), *layers])
    return [float(engine.train_batch(micro_batches(step, case, 0))) for step in range(3)]


@pytest.mark.distributed
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_answers_without_tensors_are_not_waited_for(gloo: GlooWorkers, schedule: str) -> None:
    alone = gloo.run(1, train_without_gradients_below, "1f1b", 1)[0]
    assert gloo.run(2, train_without_gradients_below, schedule, 2)[0] == pytest.approx(alone, rel=1e-5)


@dataclass
class Inbox:
    """A process group in which every message arrives at once: a description, and ones for tensors."""

    log: list[str] = field(default_factory=list)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        (tensor,) = tensors
        is_header = tensor.dtype is torch.uint8
        self.log.append("header" if is_header else "tensor")
        tensor.copy_(encode_meta(META) if is_header else torch.ones(2))
        return Work(tells=False, received=True)


META = NestedMeta((TensorMeta((2,), torch.float32, True),), "*")


def build_receiver(*, may_defer: bool) -> tuple[Receiver, list[str]]:
    inbox = Inbox()
    metas: dict[int, NestedMeta] = {}
    receiver = Receiver(
        peer=1,
        end=End(inbox, 1),  # type: ignore[arg-type]
        header_end=End(inbox, 1),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        may_defer=may_defer,
        find_meta=lambda action: metas.get(action.stage),
        learn_meta=lambda action, meta: metas.__setitem__(action.stage, meta),
    )
    return receiver, inbox.log


def test_a_receive_without_a_description_waits_for_it_where_it_is_needed() -> None:
    receiver, log = build_receiver(may_defer=True)
    # The description could depend on what this rank does after it has posted.
    receiver.post(forward(0))
    receiver.post(forward(1))
    assert log == []
    (found,) = receiver.receive(forward(0))
    torch.testing.assert_close(found, torch.ones(2))
    assert log == ["header", "tensor"]
    # What was put off is posted before what comes after it.
    receiver.post(forward(2))
    assert log == ["header", "tensor", "tensor", "tensor"]
    assert [len(receiver.receive(action)) for action in (forward(1), forward(2))] == [1, 1]


def test_over_nccl_posting_waits_for_the_description() -> None:
    receiver, log = build_receiver(may_defer=False)
    receiver.post(forward(0))
    receiver.post(forward(1))
    assert log == ["header", "tensor", "tensor"]
