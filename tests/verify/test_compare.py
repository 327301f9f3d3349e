"""Differences between runs: what counts as one, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec
from pipekit.layout import Coordinate
from pipekit.rng import fold_seed
from pipekit.tensor_parallel.shards import Shard
from pipekit.verify.compare import compare_recordings, proportion
from pipekit.verify.measurement import Measurement, first_fault
from pipekit.verify.recording import Recorder, Recording, TensorKey
from pipekit.verify.replay import compare_updates, logical_parameters, make_update

NAMES = ["embed", "middle", "head"]
WEIGHT = TensorKey("initial weights", 0, 1, "middle.weight")
OUTPUT = TensorKey("output", 0, 1, "", 0)
PASSED_BACK = TensorKey("input gradient", 0, 1, "", 0)
GRADIENT = TensorKey("gradient", 0, 1, "middle.weight")
SMALL = TensorKey("gradient", 0, 1, "middle.bias")

Tensors = Mapping[TensorKey, Tensor]


def sound() -> dict[TensorKey, Tensor]:
    """Tensors of one process: large and small tensors of each kind."""
    tensors = {}
    for layer_idx, name in enumerate(NAMES):
        keys = [
            TensorKey("initial weights", 0, layer_idx, f"{name}.weight"),
            TensorKey("gradient", 0, layer_idx, f"{name}.weight"),
            *(TensorKey(kind, 0, layer_idx, "", g) for g in (0, 1) for kind in ("output", "input gradient")),
        ]
        for key in keys:
            generator = torch.Generator().manual_seed(fold_seed(0, str(key)))
            tensors[key] = torch.randn(4, 6, generator=generator)
    tensors[SMALL] = 1e-9 * torch.ones(6)
    return tensors


def record(
    folder: Path, ranks: Sequence[tuple[Coordinate, Tensors]], *, loss: float = 2.0, norm: float = 5.0
) -> Recording:
    for rank, (coordinate, tensors) in enumerate(ranks):
        recorder = Recorder(folder / f"rank-{rank}", rank=rank, coordinate=coordinate)
        for key, tensor in tensors.items():
            recorder.write(key, tensor)
        recorder.finish(losses=[loss], norms=[norm])
    return Recording(folder)


@pytest.fixture
def expected(tmp_path: Path) -> Recording:
    return record(tmp_path / "reference", [(Coordinate(0, 0, 0), sound())])


@pytest.fixture
def differences(tmp_path: Path, expected: Recording) -> Callable[..., list[Measurement]]:
    def compare(*changes: dict[TensorKey, Tensor | None], loss: float = 2.0, norm: float = 5.0) -> list[Measurement]:
        """Compare replicas, each of which has some tensors changed or without."""
        ranks = []
        for rank, changed in enumerate(changes):
            tensors = {key: tensor for key, tensor in {**sound(), **changed}.items() if tensor is not None}
            ranks.append((Coordinate(0, rank, 0), tensors))
        place = tmp_path / f"layout-{len(list(tmp_path.iterdir()))}"
        found = record(place, ranks, loss=loss, norm=norm)
        return list(compare_recordings(found, expected, NAMES))

    return compare


def first(found: list[Measurement]) -> Measurement:
    fault = first_fault(found)
    assert fault is not None
    return fault


def test_equal_runs_agree(differences: Callable[..., list[Measurement]]) -> None:
    found = differences({}, {})
    assert first_fault(found) is None
    assert len(found) == 3 + 12 + 1 + 4 + 1
    assert all(measurement.error == 0 for measurement in found)


@pytest.mark.parametrize("key", [OUTPUT, PASSED_BACK, GRADIENT])
def test_rounding_is_allowed_and_no_more(differences: Callable[..., list[Measurement]], key: TensorKey) -> None:
    assert first_fault(differences({key: sound()[key] * (1 + 5e-5)})) is None


@pytest.mark.parametrize("key", [WEIGHT, OUTPUT, PASSED_BACK, GRADIENT])
def test_more_than_rounding_is_a_fault(differences: Callable[..., list[Measurement]], key: TensorKey) -> None:
    fault = first(differences({}, {key: sound()[key] * 1.002}))
    assert (fault.kind, fault.layer, fault.micro_batch) == (key.kind, "middle", key.micro_batch)
    assert fault.error == pytest.approx(0.002, rel=1e-3)
    assert fault.ratio == pytest.approx(1.002)
    assert (fault.ranks, fault.num_wrong, fault.num_copies, fault.apart) == ((1,), 1, 2, ("data",))


def test_one_element_is_enough_and_is_shown(differences: Callable[..., list[Measurement]]) -> None:
    changed = sound()[OUTPUT].clone()
    changed[2, 3] += 1.0
    fault = first(differences({OUTPUT: changed}))
    assert fault.found == pytest.approx(float(changed[2, 3]))
    assert fault.expected == pytest.approx(float(changed[2, 3]) - 1.0)
    assert fault.share == pytest.approx(1 / 24)
    assert fault.ratio is None
    assert fault.apart == ()


def test_the_noise_of_a_gradient_that_is_zero_is_no_fault(differences: Callable[..., list[Measurement]]) -> None:
    assert first_fault(differences({SMALL: -3e-7 * torch.ones(6)})) is None


def test_a_gradient_that_ought_to_be_next_to_zero_and_is_not(differences: Callable[..., list[Measurement]]) -> None:
    assert first(differences({SMALL: 1e-3 * torch.ones(6)})).tensor == "middle.bias"


def test_cancellation_sets_the_limit_of_an_output(tmp_path: Path) -> None:
    nothing = 1e-6 * torch.ones(4, 6)
    expected = record(tmp_path / "reference", [(Coordinate(0, 0, 0), {**sound(), OUTPUT: nothing})])
    found = record(tmp_path / "a", [(Coordinate(0, 0, 0), {**sound(), OUTPUT: nothing + 3e-8})])
    assert first_fault(compare_recordings(found, expected, NAMES)) is None
    found = record(tmp_path / "b", [(Coordinate(0, 0, 0), {**sound(), OUTPUT: nothing + 3e-6})])
    assert first_fault(compare_recordings(found, expected, NAMES)) is not None


@pytest.mark.parametrize(
    ("value", "note"),
    [
        (None, "is not there, and is in one process"),
        (torch.zeros(4, 5), "is (4, 5), and (4, 6) in one process"),
        (torch.full((4, 6), math.nan), ""),
    ],
)
def test_a_missing_or_differently_shaped_tensor_is_a_fault(
    differences: Callable[..., list[Measurement]], value: Tensor | None, note: str
) -> None:
    fault = first(differences({OUTPUT: value}))
    assert (fault.kind, fault.layer, fault.note) == ("output", "middle", note)
    assert fault.error == math.inf


def test_no_gradient_is_a_gradient_of_zero(differences: Callable[..., list[Measurement]]) -> None:
    assert first_fault(differences({SMALL: None})) is None
    unused = TensorKey("gradient", 0, 0, "embed.unused")
    assert first_fault(differences({unused: torch.zeros(3)})) is None


def test_a_gradient_that_only_the_layout_has(differences: Callable[..., list[Measurement]]) -> None:
    fault = first(differences({TensorKey("gradient", 0, 0, "embed.unused"): torch.ones(3)}))
    assert fault.note == "is there, and not in one process"


def test_numbers_of_the_step(differences: Callable[..., list[Measurement]]) -> None:
    fault = first(differences({}, {}, loss=2.1))
    assert (fault.kind, fault.layer, fault.found, fault.expected) == ("loss", None, 2.1, 2.0)
    assert fault.error == pytest.approx(0.05)


def test_a_norm_that_counts_twice(differences: Callable[..., list[Measurement]]) -> None:
    fault = first(differences({}, norm=5.1))
    assert (fault.kind, fault.step) == ("gradient norm", 0)


def test_a_loss_that_is_not_finite(differences: Callable[..., list[Measurement]]) -> None:
    assert first(differences({}, {}, loss=math.nan)).error == math.inf


def test_shards_are_joined_and_compared_as_one(tmp_path: Path, expected: Recording) -> None:
    def recorded(name: str, spoil: float) -> Recording:
        for rank in range(2):
            shard = Shard(1, (6,), rank, 2)
            place = tmp_path / name / f"rank-{rank}"
            recorder = Recorder(place, rank=rank, coordinate=Coordinate(0, 0, rank))
            for key, tensor in sound().items():
                recorder.write(key, tensor if tensor.ndim == 1 else shard.take(tensor) * spoil ** rank,
                               shard=None if tensor.ndim == 1 else shard)  # fmt: skip
            recorder.finish(losses=[2.0], norms=[5.0])
        return Recording(tmp_path / name)

    assert first_fault(compare_recordings(recorded("right", 1.0), expected, NAMES)) is None
    fault = first(list(compare_recordings(recorded("wrong", 2.0), expected, NAMES)))
    assert (fault.num_copies, fault.ranks, fault.share) == (1, (0, 1), pytest.approx(0.5, abs=0.1))


@pytest.mark.parametrize("ratio", [2.0, 0.5, -1.0, 1.5])
def test_proportional_tensors_are_known(ratio: float) -> None:
    tensor = sound()[GRADIENT]
    assert proportion(ratio * tensor, tensor) == pytest.approx(ratio)
    assert proportion(ratio * tensor + 0.1 * sound()[OUTPUT], tensor) is None
    assert proportion(tensor, torch.zeros(4, 6)) is None


def test_copies_that_differ_along_one_axis_are_told_apart_from_those_that_differ_along_two(
    tmp_path: Path, expected: Recording
) -> None:
    ranks = []
    for pipe in range(2):
        for data in range(2):
            ranks.append((Coordinate(pipe, data, 0), {**sound(), GRADIENT: (1 + data) * sound()[GRADIENT]}))
    fault = first(list(compare_recordings(record(tmp_path / "layout", ranks), expected, NAMES)))
    assert (fault.apart, fault.ranks, fault.num_wrong) == (("data",), (1, 3), 2)


class TestUpdates:
    """Weights are compared with what the optimizer makes of the layout's own gradients."""

    specs = (LayerSpec(nn.Linear, 3, 3, name="first"), LayerSpec(nn.Linear, 3, 2, name="second"))

    def run(
        self,
        folder: Path,
        *,
        lr: float = 0.1,
        scale: float = 1.0,
        clipping: float = 1.0,
        forget: str = "",
        noise: float = 1.0,
        kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> list[Measurement]:
        """Train two steps, record gradients and weights, and compare; optionally with updates that are wrong."""
        model = SequentialModel(self.specs)
        parameters = logical_parameters(model)
        optimizer = kind(list(parameters.values()), lr=1.0)  # type: ignore[call-arg]
        recorder = Recorder(folder / "rank-0", rank=0, coordinate=Coordinate(0, 0, 0))
        for step in range(2):
            kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            for name, parameter in parameters.items():
                generator = torch.Generator().manual_seed(step)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad[0] *= noise
                recorder.write(TensorKey("gradient", step, model.names.index(name.split(".")[0]), name), parameter.grad)
            make_update(optimizer, list(parameters.values()), lr=scale * lr, gradient_clipping=clipping)
            for name, parameter in parameters.items():
                if name == forget:
                    parameter.data.copy_(kept[name])
                recorder.write(TensorKey("weights", step, model.names.index(name.split(".")[0]), name), parameter)
        recorder.finish(losses=[1.0, 1.0], norms=[1.0, 1.0])
        return list(
            compare_updates(
                SequentialModel(self.specs),
                Recording(folder),
                build_optimizer=lambda trainable: kind(trainable, lr=1.0),  # type: ignore[call-arg]
                rates=[lr, lr],
                gradient_clipping=1.0,
            )
        )

    @pytest.mark.parametrize("noise", [0.0, 1e-8, 1.0])
    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
    def test_the_same_optimizer_agrees_whatever_the_gradients_are(
        self, tmp_path: Path, noise: float, kind: type[torch.optim.Optimizer]
    ) -> None:
        found = self.run(tmp_path / "run", noise=noise, kind=kind)
        assert len(found) == 8
        assert first_fault(found) is None

    @pytest.mark.parametrize("lr", [0.1, 1e-3])
    def test_another_learning_rate(self, tmp_path: Path, lr: float) -> None:
        fault = first(self.run(tmp_path / "run", lr=lr, scale=1.01))
        assert (fault.kind, fault.step, fault.layer) == ("weights", 0, "first")
        assert fault.ratio == pytest.approx(1.01, rel=1e-3)

    def test_another_clipping(self, tmp_path: Path) -> None:
        fault = first(self.run(tmp_path / "run", clipping=2.0, kind=torch.optim.SGD))
        assert fault.ratio == pytest.approx(2.0, rel=1e-3)

    def test_an_update_that_was_not_made(self, tmp_path: Path) -> None:
        fault = first(self.run(tmp_path / "run", forget="second.bias"))
        assert (fault.layer, fault.tensor) == ("second", "second.bias")
        assert fault.error == pytest.approx(1.0, rel=0.01)
