"""The data loader: replicas and resumed runs together read what one uninterrupted replica reads, bit for bit."""

from __future__ import annotations

import inspect
import itertools
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from pipekit.data import DataLoader, data_length
from pipekit.data.order import SampleOrder
from pipekit.errors import DataError

Batch = list[list[float]]


class Numbers(Dataset[tuple[int, float, float, float]]):
    """Sample `i` is `i` and a draw of each global generator."""

    classes = ("even", "odd")

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, float(torch.rand(())), float(np.random.rand()), random.random()


class ShuffledStream(IterableDataset[tuple[int, float]]):
    """The numbers up to `num_samples` in an order drawn anew in each epoch, each with a draw.

    It shards by worker, as torch's documentation advises.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __iter__(self) -> Iterator[tuple[int, float]]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in torch.randperm(self.num_samples)[first::step].tolist():
            yield index, random.random()


def collate_with_noise(samples: list[Any]) -> list[list[float]]:
    """Samples and a draw, as one of masked language models makes it."""
    return [[*map(float, sample), float(np.random.rand())] for sample in samples]


def read(loader: DataLoader, count: int | None = None, **which: Any) -> list[Any]:
    return list(itertools.islice(loader.get_data_loader(**which), count))


@settings(max_examples=40, deadline=None)
@given(
    stream=st.booleans(),
    num_samples=st.integers(1, 20),
    batch_size=st.integers(1, 6),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    num_replicas=st.integers(1, 4),
    resumes=st.lists(st.integers(0, 9), max_size=3),
    repeat=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_replicas_and_resumed_runs_together_read_the_uninterrupted_run(
    stream: bool,
    num_samples: int,
    batch_size: int,
    drop_last: bool,
    shuffle: bool,
    num_replicas: int,
    resumes: list[int],
    repeat: bool,
    seed: int,
) -> None:
    if drop_last and num_samples < batch_size:
        num_samples = batch_size

    def build() -> DataLoader:
        dataset = ShuffledStream(num_samples) if stream else Numbers(num_samples)
        return DataLoader(
            dataset, batch_size, shuffle and not stream, drop_last=drop_last, collate_fn=collate_with_noise, seed=seed
        )

    epoch = read(build())
    dropped = num_samples % batch_size if drop_last else 0
    numbers = [int(sample[0]) for batch in epoch for sample in batch]
    assert len(set(numbers)) == len(numbers) == num_samples - dropped
    whole = read(build(), 10 * num_replicas, repeat=True) if repeat else epoch
    assert whole[: len(epoch)] == epoch[: len(whole)]
    for rank in range(num_replicas):
        mine = whole[rank::num_replicas]
        # Each run reads up to the next resume point, and a new process goes on.
        points = sorted({0, *(point for point in resumes if point <= len(mine)), len(mine)})
        joined: list[Any] = []
        for start, end in itertools.pairwise(points):
            joined += read(build(), end - start, repeat=repeat, skip=start, num_replicas=num_replicas, rank=rank)
        assert joined == mine


@pytest.mark.parametrize("dataset", [Numbers(11), ShuffledStream(11)], ids=lambda value: type(value).__name__)
def test_two_workers_read_the_same_as_none(dataset: Any) -> None:
    def build(**workers: Any) -> DataLoader:
        return DataLoader(
            dataset, 2, shuffle=isinstance(dataset, Numbers), collate_fn=collate_with_noise, seed=4, **workers
        )

    which = {"repeat": True, "skip": 3, "num_replicas": 2, "rank": 1}
    whole = read(build(), 24, repeat=True)
    assert read(build(num_workers=2, timeout=60), 9, **which) == whole[1::2][3:]
    assert read(build(num_workers=2, timeout=60)) == whole[:6]


def test_the_order_is_that_of_sample_order_and_does_not_depend_on_how_often_it_was_read() -> None:
    loader = DataLoader(range(10), 5, shuffle=True, seed=8)
    expected = SampleOrder(10, seed=8).indices(0, 30).reshape(6, 5).tolist()
    for _ in range(2):
        assert [batch.tolist() for batch in read(loader, 6, repeat=True)] == expected
        assert [batch.tolist() for batch in loader] == expected[:2]


def test_the_seed_is_the_loaders_else_the_generators_else_the_runs() -> None:
    def order(run_seed: int, **arguments: Any) -> list[int]:
        loader = DataLoader(range(20), 20, shuffle=True, **arguments)
        (batch,) = loader.get_data_loader(seed=run_seed)
        return [int(index) for index in batch]

    generator = torch.Generator().manual_seed(3)
    expected = SampleOrder(20, seed=3).indices(0, 20).tolist()
    assert order(3) == order(7, seed=3) == order(7, generator=generator) == expected
    assert order(7, seed=3, generator=torch.Generator().manual_seed(5)) == expected
    assert order(7) != expected


def test_a_stream_draws_other_numbers_in_each_epoch_and_for_each_batch() -> None:
    batches = read(DataLoader(ShuffledStream(20), batch_size=5, collate_fn=collate_with_noise), 8, repeat=True)
    first, second = ([sample[0] for batch in part for sample in batch] for part in (batches[:4], batches[4:]))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    noise = [sample[-1] for batch in batches for sample in batch]
    assert len(set(noise)) == len(noise)


def test_skip_counts_batches_and_not_their_micro_batches() -> None:
    loader = DataLoader(range(24), 1)
    rest = read(loader, skip=2, num_replicas=2, rank=1, num_micro_batches=3)
    assert [int(batch) for batch in rest] == [13, 15, 17, 19, 21, 23]


def test_reading_leaves_the_models_draws_alone() -> None:
    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    for dataset, sampler in ((Numbers(4), None), (Numbers(4), RandomSampler(range(4))), (ShuffledStream(4), None)):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        expected = draws()
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        assert len(read(DataLoader(dataset, 2, sampler=sampler))) == 2
        assert draws() == expected


class LazyBatches:
    """A user's own batch sampler, which draws from a global generator while it is read."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(4):
            yield random.sample(range(50), 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampler": RandomSampler(range(50)), "batch_size": 3},
        {"sampler": WeightedRandomSampler([1.0] * 50, 12), "batch_size": 3},
        {"sampler": RandomSampler(range(50), generator=torch.Generator().manual_seed(1)), "batch_size": 3},
        {"batch_sampler": LazyBatches()},
        {"batch_sampler": BatchSampler(RandomSampler(range(50)), 3, drop_last=True)},
    ],
    ids=["random", "weighted", "generator", "lazy", "batches"],
)
def test_samplers_that_draw_are_resumed_exactly(arguments: dict[str, Any]) -> None:
    loader = DataLoader(range(50), **arguments)
    whole = [batch.tolist() for batch in read(loader, 40, repeat=True)]
    assert whole[:4] != whole[4:8]
    assert [batch.tolist() for batch in read(loader, 4)] == whole[:4]
    torch.rand(3), random.random()
    rest = read(loader, 10, repeat=True, skip=7, num_replicas=2, rank=1)
    assert [batch.tolist() for batch in rest] == whole[1::2][7:17]


def test_datasets_of_whole_batches() -> None:
    whole = [torch.arange(3), torch.arange(5), torch.arange(2)]

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(whole)

    for dataset in (whole, Stream()):
        batches = read(DataLoader(dataset, batch_size=None), 2, repeat=True, skip=1, num_replicas=2, rank=1)
        assert [batch.tolist() for batch in batches] == [whole[0].tolist(), whole[2].tolist()]


def test_batches_are_torchs() -> None:
    class Many(Numbers):
        def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
            return [{"index": index, "name": str(index)} for index in indices]

    (batch,) = DataLoader(Many(3), 3)
    expected = default_collate([{"index": index, "name": str(index)} for index in range(3)])
    assert torch.equal(batch.pop("index"), expected.pop("index"))
    assert batch == expected


def test_the_loader_shows_the_users_dataset_and_its_length() -> None:
    loader = DataLoader(Numbers(7), 2, pin_memory=True)  # pinned where there is a GPU
    assert len(loader) == 4
    part = loader.get_data_loader(num_replicas=3, rank=0, skip=1)
    assert len(part) == len(list(part)) == 1
    assert len(part.dataset) == 7  # type: ignore[arg-type]
    assert part.dataset.classes == Numbers.classes  # type: ignore[attr-defined]
    assert part.dataset[3][0] == 3
    assert len(loader.get_data_loader(repeat=True, skip=100)) == 4
    sent = pickle.loads(pickle.dumps(part.dataset))  # to a worker that is spawned
    assert sent.__getitems__((3, [6]))[1:] == part.dataset.__getitems__((3, [6]))[1:]  # type: ignore[attr-defined]


def test_arguments_are_torchs_in_its_order() -> None:
    theirs = inspect.signature(torch.utils.data.DataLoader.__init__).parameters
    ours = inspect.signature(DataLoader.__init__).parameters
    assert set(theirs) <= set(ours)
    assert set(ours) - set(theirs) == {"seed"}
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
    positional = [name for name, parameter in theirs.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert list(ours)[: len(positional)] == positional


class OneShot(IterableDataset[int]):
    """An iterable dataset that can be read once."""

    def __init__(self) -> None:
        self.rest = iter(range(3))

    def __iter__(self) -> Iterator[int]:
        return self.rest


def test_what_cannot_be_exact_is_refused() -> None:
    stream = ShuffledStream(4)
    for name, value in (("shuffle", True), ("sampler", [0]), ("batch_sampler", [[0]])):
        with pytest.raises(DataError, match=f"{name} needs a map-style dataset, and ShuffledStream is"):
            DataLoader(stream, **{name: value})
    with pytest.raises(DataError, match="OneShot yields no batch of 1 in epoch 1"):
        read(DataLoader(OneShot()), 4, repeat=True)
    with pytest.raises(DataError, match="yields no batch of 5 in epoch 0"):
        read(DataLoader(stream, 5, drop_last=True), 1, repeat=True)
    for dataset in (stream, range(4)):
        # Two batches: replica 0 may have read both of its own, and no more.
        assert read(DataLoader(dataset, 2), skip=1, num_replicas=2) == []
        with pytest.raises(DataError, match="skip=2 goes beyond the data, which are 2 batches"):
            read(DataLoader(dataset, 2), skip=2, num_replicas=2)
    distributed = torch.utils.data.DistributedSampler(range(4), num_replicas=2, rank=0)  # type: ignore[arg-type, var-annotated]
    for arguments in ({"sampler": distributed}, {"batch_sampler": BatchSampler(distributed, 2, False)}):
        with pytest.raises(DataError, match="torch's DistributedSampler would shard the data once more"):
            DataLoader(range(4), **arguments)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="rank=2 and num_replicas=2"):
        DataLoader(stream).get_data_loader(num_replicas=2, rank=2)


@pytest.mark.parametrize(
    ("dataset", "arguments", "what"),
    [
        (range(4), {"batch_size": 0}, "DataLoader of a range: batch_size should be a positive"),
        (range(4), {"num_workers": -1}, "num_workers option should be non-negative"),
        (range(4), {"shuffle": True, "sampler": SequentialSampler([0])}, "mutually exclusive with shuffle"),
        (range(4), {"batch_sampler": [[0]], "drop_last": True}, "mutually exclusive"),
        (range(4), {"prefetch_factor": 2}, "prefetch_factor option could only"),
        (range(4), {"in_order": False}, "in_order=False hands batches out as workers finish them"),
        (iter([1]), {}, "list_iterator has no __getitem__; give a map-style dataset"),
    ],
)
def test_arguments_that_would_not_work_are_refused_at_once(dataset: Any, arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        DataLoader(dataset, **arguments)


def test_the_length_of_a_batch_is_that_of_its_first_tensor() -> None:
    assert data_length((torch.zeros(4, 2), torch.zeros(4))) == 4
    assert data_length({"id": "a", "nested": [None, {"x": np.zeros((5, 1))}]}) == 5
    for batch in (torch.tensor(1.0), {"a": 3}, []):
        with pytest.raises(DataError, match="override get_batch_length"):
            data_length(batch)
