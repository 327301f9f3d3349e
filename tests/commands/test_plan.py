"""`pipekit plan`, in this process and as a command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipekit.commands.plan import PlanOptions, command, parse_tokens, plan_report
from pipekit.config import Config, load_config
from pipekit.errors import ConfigError, PipekitError
from pipekit.plan.plan import Plan
from pipekit.plan.resources import Resources
from pipekit.predictions.devices import Device
from pipekit.predictions.prediction import PlannedModel
from pipekit.predictions.search import SearchResult, SearchSpace, search_layouts
from pipekit.training.prepare import prepare_run

MODEL = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "max_positions": 64, "vocab_size": 300}
H100 = PlanOptions(device="h100")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a small run."""
    config = {
        "run": {"device": "cpu"},
        "model": MODEL,
        "parallel": {"pp": 2},
        "train": {"steps": 2, "global_batch_size": 8, "sequence_length": 64},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "c.yaml"


def refused(path: Path, options: PlanOptions, *overrides: str) -> str:
    with pytest.raises(PipekitError) as caught:
        plan_report(load_config(path, overrides), options)
    return str(caught.value)


def test_json_is_all_that_is_printed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(path, ["parallel.dp=2"], device="h100", as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(found) >= {"parameters", "layout", "step_time_s", "tokens_per_s", "tflops_per_device", "bubble_fraction"}
    assert found["layout"]["dp"] == 2
    assert len(found["stages"]) == 2
    for stage in found["stages"]:
        assert set(stage) >= {"layers", "parameters", "memory_bytes", "time_s"}
        assert stage["memory_bytes"]["total"] > stage["memory_bytes"]["weights"] > 0
    assert {other["method"] for other in found["partitions"]} == {"parameters", "uniform", "flops", "memory"}
    assert found["timeline"]


def test_tables_are_printed_and_a_page_written(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = path.with_name("plan.html")
    command(path, device="h100", html=page)
    shown = capsys.readouterr().out
    assert "2 x h100 with 80.0 GB" in shown
    assert "pp=2 x dp=1 x tp=1" in shown
    assert str(page) in shown
    assert page.read_text().casefold().startswith("<!doctype html>")
    assert "--raw" not in shown


def test_what_cannot_be_exported_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(path, ["model.num_kv_heads=2"], device="h100")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("pipekit export takes this model with --raw alone: it has model.num_kv_heads=2 for 4 heads")


def test_the_device_of_the_plan_decides_the_number_format(path: Path) -> None:
    on_gpu, on_cpu = (plan_report(load_config(path), PlanOptions(device=name)) for name in ("h100", "cpu"))
    assert on_cpu["stages"][0]["memory_bytes"]["weights"] == 2 * on_gpu["stages"][0]["memory_bytes"]["weights"]


def test_without_a_device_it_is_what_is_here(path: Path) -> None:
    found = plan_report(load_config(path), PlanOptions())
    assert found["device"]["name"] == "cpu"


def test_layouts_over_devices_are_compared(path: Path) -> None:
    found = plan_report(load_config(path), PlanOptions(num_devices=4, device="h100", max_tp=2))
    assert found["layouts"][0]["layout"] == found["layout"]
    assert found["num_fitting"] >= len(found["layouts"]) > 1
    layout = found["layout"]
    assert layout["pp"] * layout["dp"] * layout["tp"] == 4
    assert any(entry["layout"]["tp"] == 2 for entry in found["layouts"])
    assert all(entry["reason"] for entry in found["rejected"])


def test_a_whole_run_takes_so_many_days_and_costs_so_much(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_report(load_config(path), PlanOptions(device="h100", num_tokens=10**12, price=2.5))
    hours = 10**12 / found["tokens_per_s"] / 3600
    assert found["run"]["days"] == pytest.approx(hours / 24)
    assert (found["run"]["device_hours"], found["run"]["cost"]) == pytest.approx((2 * hours, 5 * hours))
    assert "cost" not in plan_report(load_config(path), PlanOptions(num_devices=2, device="h100", num_tokens=9))["run"]
    page = path.with_name("plan.html")
    command(path, device="h100", tokens="1T", price=2.5, html=page)
    assert f"1.0 T tokens in {hours / 24:,.1f} days: {2 * hours:,.0f} device hours" in capsys.readouterr().out
    for said in (f"{hours / 24:,.1f} days", f"{2 * hours:,.0f}", f"{5 * hours:,.0f}"):
        assert f"<dd>{said}</dd>" in page.read_text()


@pytest.mark.parametrize("text", ["many", "0", "-3B", "B", "", "infT"])
def test_tokens_that_are_no_number_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--tokens {text}: must be a number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("options", "overrides", "stages"),
    [
        (PlanOptions(num_devices=4, device="h100"), [], [0, 1, 2, 3]),
        (PlanOptions(num_devices=4, device="h100"), ["train.loss_chunk_tokens=64"], [0, 1, 2]),
        (PlanOptions(num_devices=4, device="cpu"), [], [0, 1]),
    ],
)
def test_zero_stages_that_are_compared(
    path: Path, options: PlanOptions, overrides: list[str], stages: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[SearchSpace] = []

    def note(model: PlannedModel, space: SearchSpace, device: Device, **options: int) -> SearchResult:
        compared.append(space)
        return search_layouts(model, replace(space, zero=(0, 1)), device, **options)

    monkeypatch.setattr("pipekit.plan.search.search_layouts", note)
    plan_report(load_config(path, overrides), options)
    assert [list(space.zero) for space in compared] == [stages]


@pytest.mark.parametrize(
    ("options", "overrides", "degrees"),
    [
        (PlanOptions(num_devices=4, device="h100"), [], [1, 2, 4]),
        (PlanOptions(num_devices=4, device="h100", max_tp=1), [], [1]),
        (PlanOptions(num_devices=4, device="cpu"), [], [1]),
        (PlanOptions(num_devices=4, device="cpu"), ["parallel.tp=2"], [2]),
        (PlanOptions(num_devices=4, device="h100", max_tp=4), ["parallel.tp=2"], [1, 2, 4]),
    ],
    ids=["a node of GPUs", "as told", "CPUs", "that of the configuration", "more than it"],
)
def test_tensor_parallel_degrees_that_are_compared(
    path: Path, options: PlanOptions, overrides: list[str], degrees: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def note(model: PlannedModel, space: SearchSpace, device: Device, **options: int) -> SearchResult:
        compared.extend(space.tp)
        return search_layouts(model, space, device, **options)

    monkeypatch.setattr("pipekit.plan.search.search_layouts", note)
    plan_report(load_config(path, overrides), options)
    assert compared == degrees


def test_a_device_of_ones_own(path: Path) -> None:
    mine = path.with_name("devices.yaml")
    mine.write_text("h100: {memory_bytes: 40e9}\n")
    found = plan_report(load_config(path), PlanOptions(device="h100", device_files=(mine,)))
    assert found["device"]["memory_bytes"] == 40e9


def test_measured_seconds_are_taken(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = plan_report(load_config(path), PlanOptions(measure=True))
    assert "profile" in {other["method"] for other in found["partitions"]}
    assert found["step_time_s"] > 0


@pytest.mark.parametrize("name", ["h100", "cpu"])
def test_what_is_for_a_device_that_is_named_is_not_measured_here(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("pipekit.costs.model.profile_layers", refuse)
    options = PlanOptions(device=name)
    found = plan_report(load_config(path, ["parallel.partition=profile"]), options)
    by_operations = plan_report(load_config(path, ["parallel.partition=flops"]), options)
    assert found["boundaries"] == by_operations["boundaries"]
    assert {other["method"] for other in found["partitions"]} == {"parameters", "uniform", "flops", "memory"}


@pytest.mark.parametrize(
    ("options", "overrides", "parts"),
    [
        (PlanOptions(device="h10"), [], ["device=h10", "did you mean h100"]),
        (PlanOptions(device="h100", measure=True), [], ["--measure", "--device h100", "give only one"]),
        (PlanOptions(num_devices=4, measure=True), [], ["--measure", "--devices"]),
        (PlanOptions(device="h100", max_tp=8), [], ["--max-tp 8", "add --devices"]),
        (PlanOptions(device="h100", price=2.5), [], ["--price 2.5", "add --tokens"]),
        (
            PlanOptions(num_devices=4, device="h100"),
            ["parallel.memory_limit_gb=0.0001"],
            ["none of", "4 x h100", "the nearest is pp=", "GB of 0.00 GB", "try more devices"],
        ),
        (PlanOptions(num_devices=13, device="h100"), [], ["13 x h100", "train.global_batch_size of 8"]),
        (
            H100,
            ["parallel.partition=memory", "parallel.memory_limit_gb=0.001"],
            ["do not fit into the memory of parallel.pp=2 ranks", "more than the", "try a parallel.pp greater than 2"],
        ),
        (H100, ["parallel.schedule=zb-h9"], ["parallel.schedule=zb-h9"]),
    ],
)
def test_mistakes_say_what_to_type(path: Path, options: PlanOptions, overrides: list[str], parts: list[str]) -> None:
    message = refused(path, options, *overrides)
    for part in parts:
        assert part in message


TRIAL = """
from torch import nn
from pipekit import Example, LayerSpec, LayersTrial

class Silent(LayersTrial):
    @classmethod
    def build_layers(cls, config):
        return [LayerSpec(nn.Linear, 8, 8), LayerSpec(nn.Linear, 8, 8)]

class Telling(Silent):
    @classmethod
    def example(cls, config, micro_batch_size):
        import torch
        return Example(torch.empty(micro_batch_size, 8, device="meta"))
"""


def test_a_trial_of_ones_own_says_what_it_is_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.with_name("planned_trial.py").write_text(TRIAL)
    monkeypatch.syspath_prepend(str(path.parent))
    message = refused(path, H100, "run.trial=planned_trial:Silent")
    assert "run.trial=planned_trial:Silent" in message
    assert "example(config, micro_batch_size)" in message
    found = plan_report(load_config(path, ["run.trial=planned_trial:Telling"]), H100)
    assert [stage["parameters"] for stage in found["stages"]] == [72, 72]


@pytest.mark.parametrize(
    ("key", "value"),
    [("pp", "2"), ("order", "[data, pipe, tensor]"), ("schedule", "zb-v"), ("partition", "flops"), ("zero", "0")],
)
def test_what_auto_chooses_is_not_given_beside_it(path: Path, key: str, value: str) -> None:
    config = yaml.safe_load(path.read_text())
    config["parallel"] = "auto"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=rf"parallel\.{key}={re.escape(value)} does not go with parallel\.auto=true"):
        load_config(path, [f"parallel.{key}={value}"])


def auto(path: Path, *overrides: str) -> Config:
    config = yaml.safe_load(path.read_text())
    config |= {"parallel": "auto", "data": {"source": str(path.with_name("text.txt")), "vocab_size": 300}}
    config["data"]["cache_dir"] = str(path.with_name("cache"))
    path.write_text(yaml.safe_dump(config))
    path.with_name("text.txt").write_text("\n".join(f"line {i} of {i * i}" for i in range(3000)))
    return load_config(path, overrides)


def planned(config: Config, *, world_size: int) -> Plan:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return prepare_run(config, Resources(world_size=world_size, memory_bytes=memory_bytes), start=None).plan


def test_auto_chooses_what_plan_ranks_first(path: Path) -> None:
    config = auto(path)
    made = planned(config, world_size=4)
    found = plan_report(config, PlanOptions(num_devices=4))
    assert made.layout.world_size == 4
    for key in ("pp", "dp", "zero", "schedule"):
        assert getattr(made.config.parallel, key) == found["layout"][key]
    assert made.config.train.micro_batch_size == found["layout"]["micro_batch_size"]
    assert not made.config.parallel.auto
    assert list(made.boundaries) == found["boundaries"]
    assert made.chosen is not None
    assert made.chosen.startswith(f"pp={made.layout.pp} x dp={made.layout.dp} x tp=1")
    assert "the fastest of" in made.chosen
    assert "the next (pp=" in made.chosen


def test_auto_keeps_to_the_memory_that_is_allowed(path: Path) -> None:
    config = auto(path, "parallel.memory_limit_gb=0.0001")
    with pytest.raises(PipekitError, match=r"of 0\.00 GB"):
        planned(config, world_size=2)


TRILLION = """
import resource, sys
from pipekit.cli import app
sys.argv = ["pipekit", "plan", sys.argv[1], "--device", "h100", "--json"]
try:
    app()
finally:
    sys.stderr.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""


def test_a_trillion_parameters_are_planned_without_allocating_them(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    config["model"] = {"hidden_size": 25600, "num_layers": 128, "num_heads": 160, "vocab_size": 51200}
    config["model"]["max_positions"] = 2048
    config["train"] |= {"global_batch_size": 3072, "sequence_length": 2048, "activation_checkpointing": True}
    config["parallel"] = {"pp": 64, "dp": 48, "partition": "flops"}
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-c", TRILLION, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(done.stdout)
    assert found["parameters"] == pytest.approx(1.008e12, rel=1e-3)
    assert len(found["stages"]) == 64
    assert int(done.stderr) < 1e6, "kilobytes"


def test_a_page_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {preset: gpt2}\ntrain: {steps: 1}\n")
    with pytest.raises(PipekitError, match=r"--html .*page.html: cannot be written: no such folder"):
        command(path, device="h100", html=tmp_path / "no" / "page.html")
