"""Measured costs of layers: what is kept of them, and when they are measured anew."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.costs.describe import describe_layers
from pipekit.costs.fingerprint import Fingerprinter, UnstableError
from pipekit.costs.profiling import profile_layers
from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.transformer import language_model_loss
from pipekit.predictions.layer_costs import LayerCosts, ModelCosts
from pipekit.tensors import weight_gradients

UNMEASURED: dict[str, None] = {"forward_s": None, "input_gradient_s": None, "weight_gradient_s": None}


class Counting(nn.Module):
    """Counts its forwards, of all instances."""

    forwards = 0

    def __init__(self, width: int, *, note: object = None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta":
            Counting.forwards += 1
        y: Tensor = self.linear(x)
        return y


def forwards(run: Callable[[], object]) -> int:
    before = Counting.forwards
    run()
    return Counting.forwards - before


@pytest.fixture
def profile(tmp_path: Path) -> Callable[..., ModelCosts]:
    settings = {"dtype": torch.float32, "device": "cpu", "cache_dir": tmp_path / "profiles", "repeats": 3}

    def run(specs: list[LayerSpec], inputs: Any, **changes: Any) -> ModelCosts:
        return profile_layers(specs, inputs, **{**settings, **changes})

    return run


Profile = Callable[..., ModelCosts]


def test_costs_are_those_described_with_seconds(profile: Profile) -> None:
    specs = GPT2Config(preset="tiny", vocab_size=512, num_layers=2, dropout=0.1).layer_specs()
    ids = torch.randint(512, (2, 16))
    kwargs = {"dtype": torch.float32, "loss_fn": language_model_loss, "labels": ids}
    measured, described = profile(specs, ids, **kwargs), describe_layers(specs, ids, **kwargs)
    # What was measured needs no kernels.
    assert [replace(layer, **UNMEASURED) for layer in measured.layers] == [
        replace(layer, work=None) for layer in described.layers
    ]
    assert measured.loss is not None
    assert described.loss is not None
    assert replace(measured.loss, **UNMEASURED) == replace(described.loss, work=None)
    assert all(layer.seconds > 0 for layer in [*measured.layers, measured.loss])
    # Equal layers are measured once.
    assert measured.layers[2] is measured.layers[4]


def test_a_far_larger_layer_takes_longer(profile: Profile) -> None:
    small, large = (
        profile([LayerSpec(nn.Linear, width, width)], torch.zeros(64, width)).layers[0] for width in (16, 1024)
    )
    assert small.forward_s is not None
    assert large.forward_s is not None
    assert large.forward_s > small.forward_s
    assert large.weight_gradient_s is not None
    assert small.weight_gradient_s is not None
    assert large.weight_gradient_s > small.weight_gradient_s


class Recording(nn.Module):
    """Notes what it is given."""

    seen: list[Any] = []  # noqa: RUF012

    def forward(self, inputs: Any) -> Any:
        Recording.seen.append(inputs)
        return inputs


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"x": self.linear(x).relu_(), "ids": x.argmax(-1), "mask": (x > 0, None)}


def test_layers_are_given_what_they_would_be_in_a_run(profile: Profile) -> None:
    Recording.seen = []
    example = torch.arange(8.0).reshape(2, 4)
    specs = [LayerSpec(Recording), LayerSpec(Several), LayerSpec(Recording)]
    profile(specs, example, dtype=torch.bfloat16)
    first, last = (
        [seen for seen in Recording.seen if isinstance(seen, kind) and not _is_meta(seen)] for kind in (Tensor, dict)
    )
    assert first[0].dtype == torch.bfloat16
    assert torch.equal(first[0].float(), example)
    assert not first[0].requires_grad
    assert last[0]["x"].requires_grad
    assert last[0]["x"].dtype == torch.bfloat16
    assert last[0]["ids"].tolist() == [0, 0]
    assert last[0]["mask"][0].all()
    assert last[0]["mask"][1] is None
    assert torch.equal(last[0]["x"], last[-1]["x"])


def _is_meta(value: Any) -> bool:
    tensor = value["x"] if isinstance(value, dict) else value
    return bool(tensor.device.type == "meta")


def test_the_gradients_are_apart_as_in_a_split_backward(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    deferred: list[str] = []

    def note(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            deferred.append(name)
            return compute(*args)

        return run

    for name in ("__call__", "add_to"):
        monkeypatch.setattr(
            weight_gradients.OuterProduct, name, note(name, getattr(weight_gradients.OuterProduct, name))
        )
    profile([LayerSpec(nn.Linear, 4, 4)], torch.zeros(2, 4), repeats=2)
    # The first makes the gradient, the others add to it; two of them warm up.
    assert deferred == ["__call__", "add_to", "add_to", "add_to"]


def test_what_was_measured_is_read_again(profile: Profile) -> None:
    specs = [LayerSpec(Counting, 8), LayerSpec(Counting, 8), LayerSpec(Counting, 8)]
    told: list[tuple[str, float | None]] = []
    first: list[ModelCosts] = []
    again: list[ModelCosts] = []
    kwargs = {"loss_fn": F.mse_loss, "labels": torch.zeros(2, 8), "on_progress": lambda *args: told.append(args)}
    # The first layer computes no gradient of its input.
    assert forwards(lambda: first.append(profile(specs, torch.zeros(2, 8), **kwargs))) == 2 * (2 + 3)
    assert [text.partition(" on ")[0] for text, _ in told] == [
        "measuring layer 'layers.0' (Counting)",
        "measuring layer 'layers.1' (Counting)",
        "measuring the loss function mse_loss",
    ]
    assert [done for _, done in told] == [0, 1 / 3, 1]
    told.clear()
    assert forwards(lambda: again.append(profile(specs, torch.zeros(2, 8), **kwargs))) == 0
    assert told == []
    assert again == first


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": torch.bfloat16},
        {"inputs": torch.zeros(3, 8)},
        {"inputs": torch.zeros(2, 8, requires_grad=True)},
        {"specs": [LayerSpec(Counting, 8, note="another")]},
    ],
)
def test_what_differs_is_measured_anew(profile: Profile, changed: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"specs": [LayerSpec(Counting, 8)], "inputs": torch.zeros(2, 8)}
    assert forwards(lambda: profile(**settings)) > 0
    assert forwards(lambda: profile(**{**settings, **changed})) > 0
    assert forwards(lambda: profile(**{**settings, **changed})) == 0
    assert forwards(lambda: profile(**settings)) == 0


def test_another_number_of_threads_is_another_machine(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(profile, [LayerSpec(Counting, 8)], torch.zeros(2, 8))
    assert forwards(run) > 0
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert forwards(run) > 0
    monkeypatch.undo()
    assert forwards(run) == 0


def test_an_edited_class_is_measured_anew(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edited_layers.py"

    def load(line: str) -> list[LayerSpec]:
        file.write_text(
            "from torch import nn\n"
            "class Inner(nn.Module):\n"
            f"    def forward(self, x):\n        {line}\n        return x + 1\n"
        )
        description = importlib.util.spec_from_file_location("edited_layers", file)
        assert description is not None
        assert description.loader is not None
        module = importlib.util.module_from_spec(description)
        monkeypatch.setitem(sys.modules, "edited_layers", module)
        description.loader.exec_module(module)
        # The edited class is inside another.
        return [LayerSpec(nn.Sequential, module.Inner()), LayerSpec(module.Inner)]

    told: list[str] = []
    run = partial(profile, on_progress=lambda text, done: told.append(text))
    for line, measured in (("pass", 2), ("pass", 0), ("x = x * 2", 2), ("pass", 0)):
        told.clear()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            run(load(line), torch.zeros(2, 8, requires_grad=True))
        finally:
            sys.dont_write_bytecode = before
        assert len(told) == measured, line


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"float32"', '"float99"'),
        lambda text: text.replace('"identity"', '"identify"'),
        lambda text: text.replace('"forward_s": ', '"forward_s": -'),
        lambda text: text.replace('"keeps_input": true', '"keeps_input": 1'),
        lambda text: json.dumps(json.loads(text) | {"costs": {}}),
        lambda text: text.replace('"structure": "*"\n }\n', '"structure": null\n }\n'),
        lambda text: "\x00\xff",
    ],
)
def test_a_broken_file_is_measured_anew(
    profile: Profile, tmp_path: Path, damage: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    run = partial(profile, [LayerSpec(Counting, 8)], torch.zeros(2, 8))
    run()
    (file,) = (tmp_path / "profiles").iterdir()
    text = file.read_text()
    broken = damage(text)
    assert broken != text
    file.write_bytes(broken.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert forwards(run) > 0
    assert "measured anew" in caplog.text
    assert forwards(run) == 0
    assert list((tmp_path / "profiles").iterdir()) == [file]


def test_a_folder_that_cannot_be_written_is_no_error(
    profile: Profile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    run = partial(profile, [LayerSpec(Counting, 8)], torch.zeros(2, 8), cache_dir=tmp_path / "file" / "profiles")
    assert forwards(run) > 0
    assert "cannot be kept" in caplog.text
    assert forwards(run) > 0


class NeedsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * max(1.0, x.sum().item())


def test_a_layer_that_cannot_be_described_is_measured(profile: Profile) -> None:
    specs = [LayerSpec(nn.Linear, 8, 8), LayerSpec(NeedsValues)]
    costs = profile(specs, torch.zeros(2, 8)).layers[1]
    assert (costs.forward_flops, costs.input_gradient_flops, costs.weight_gradient_flops) == (256, 256, 256)
    assert (costs.parameters, costs.keeps_input, costs.input_bytes) == (72, True, 64)


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta":
            raise ValueError("broken")
        return x


class Speaks(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, "text"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LayerSpec(Breaks, name="bad"), r"layer 'bad' \(Breaks\) cannot be measured on float32\[2, 8\]: ValueError"),
        (LayerSpec(nn.Linear, 7, 8, name="bad"), r"layer 'bad' \(Linear\) cannot be measured"),
        (LayerSpec(Speaks, name="bad"), r"layer 'bad' \(Speaks\): its output holds a str"),
    ],
)
def test_a_layer_that_fails_is_named(profile: Profile, spec: LayerSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile([LayerSpec(nn.Linear, 8, 8), spec], torch.zeros(2, 8))
    with pytest.raises(ConfigError, match="loss function cross_entropy cannot be measured"):
        profile([LayerSpec(nn.Linear, 8, 8)], torch.zeros(2, 8), loss_fn=F.cross_entropy, labels=torch.zeros(3))


def test_random_numbers_are_left_as_they_were(profile: Profile) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    profile([LayerSpec(nn.Linear, 8, 8), LayerSpec(nn.Dropout, 0.5)], torch.zeros(2, 8))
    assert torch.equal(torch.rand(3), expected)


class Tells:
    def __init__(self, width: int) -> None:
        self.width = width

    def __repr__(self) -> str:
        return f"Tells({self.width})"


def make(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(width, width)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        ((1, 2), [1, 2]),
        ({"a": 1}, {"a": 2}),
        (torch.float16, torch.bfloat16),
        (torch.zeros(2), torch.zeros(3)),
        (nn.Linear, nn.Bilinear),
        (Tells(1), Tells(2)),
        (make(1), make(2)),
        (partial(nn.Linear, 4, 4), partial(nn.Linear, 4, 5)),
        (LayerCosts(1, 1, 1, 1, 1, 1, 1, True, True), LayerCosts(1, 1, 1, 1, 1, 1, 2, True, True)),
    ],
)
def test_different_things_have_different_fingerprints(one: object, other: object) -> None:
    texts = [json.dumps(Fingerprinter().of(value)) for value in (one, other)]
    assert texts[0] != texts[1]
    assert [json.dumps(Fingerprinter().of(value)) for value in (one, other)] == texts


def test_what_tells_nothing_of_itself_is_measured_every_time(profile: Profile) -> None:
    with pytest.raises(UnstableError):
        Fingerprinter().of(object())
    run = partial(profile, [LayerSpec(Counting, 8, note=object())], torch.zeros(2, 8))
    assert forwards(run) > 0
    assert forwards(run) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_timed_by_its_own_clock(profile: Profile) -> None:
    specs = [LayerSpec(nn.Linear, 4096, 4096), LayerSpec(nn.Linear, 4096, 4096)]
    costs = profile(specs, torch.zeros(4096, 4096), device="cuda", dtype=torch.bfloat16).layers[1]
    assert costs.forward_s is not None
    # 137 GFLOP: more than 20 µs on anything there is, and less than a second.
    assert 2e-5 < costs.forward_s < 1
