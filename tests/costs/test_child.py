"""Layers measured in a child process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.costs.child import profile_in_child
from pipekit.costs.profiling import profile_layers
from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec


def is_parent() -> bool:
    return str(os.getpid()) == os.environ.get("PIPEKIT_TEST_PARENT")


class Elsewhere(nn.Linear):
    """Refuses to run in the process of the test, and prints to where messages go."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.device.type == "meta" or not is_parent()
        os.write(1, b"not a message\n")
        return super().forward(x)


class Dies(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta" and not is_parent():
            os._exit(7)
        return x


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PIPEKIT_TEST_PARENT", str(os.getpid()))
    return {"dtype": torch.float32, "device": "cpu", "repeats": 2, "cache_dir": tmp_path}


def test_a_child_measures_and_tells_what_it_does(options: dict[str, Any]) -> None:
    said: list[tuple[str, float]] = []
    specs = [LayerSpec(nn.Linear, 8, 8, name="first"), LayerSpec(Elsewhere, 8, 8, name="second")]
    found = profile_in_child(
        specs,
        torch.randn(2, 8),
        loss_fn=F.mse_loss,
        labels=torch.zeros(2, 8),
        on_progress=lambda *s: said.append(s),
        **options,
    )
    assert [share for _, share in said] == [0.0, 0.5, 1.0]
    assert all(layer.forward_s is not None for layer in found.layers)
    # What it has stored is what a measurement here finds.
    specs = [LayerSpec(nn.Linear, 8, 8, name="first")]
    assert profile_layers(specs, torch.randn(2, 8), **options).layers == found.layers[:1]


def test_its_errors_are_those_of_the_measurement(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="layer 'narrow'"):
        profile_in_child([LayerSpec(nn.Linear, 4, 4, name="narrow")], torch.randn(2, 8), **options)
    with pytest.raises(ConfigError, match=r"ended with exit code 7.*choose a parallel\.partition that runs nothing"):
        profile_in_child([LayerSpec(Dies)], torch.randn(2, 8), **options)


def test_layers_that_cannot_be_sent_are_measured_here(options: dict[str, Any]) -> None:
    specs = [LayerSpec(nn.Linear, 8, 8)]
    costs = profile_in_child(
        specs, torch.randn(2, 8), loss_fn=lambda y, labels: y.sum(), labels=torch.zeros(1), **options
    )
    assert costs.layers[0].forward_s is not None
