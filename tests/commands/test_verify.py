"""`pipekit verify` in processes of its own: it passes on sound models, and finds bugs that were put in on purpose."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fork_server import run_pipekit
from pipekit.models import find_families

pytestmark = pytest.mark.distributed

BUGGY = '''
"""Models and trials with one bug each."""
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from pipekit import LanguageModelTrial, LayerSpec
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.transformer import MLPHalf
from pipekit.tensor_parallel import RowParallelLinear


def sound(config):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 32, "init_std": 0.1}
    return GPT2Config(vocab_size=config.data.vocab_size, **sizes, **config.model.args).layer_specs()


def with_mlp(kind):
    def build(config):
        specs = sound(config)
        (place,) = [index for index, spec in enumerate(specs) if spec.name == "blocks.1.mlp"]
        spec = specs[place]
        specs[place] = LayerSpec(kind, *spec.module_args, name=spec.name, **spec.module_kwargs)
        return specs

    return build


class OwnSeed(MLPHalf):
    """Draws its initial weights from a generator that is seeded by the process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.normal_(self.expand.weight, std=0.1, generator=torch.Generator().manual_seed(os.getpid()))


class OwnNoise(MLPHalf):
    """Draws what it adds from a generator that nobody seeds anew."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn(x.shape, generator=self.generator)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.distributed.get_world_size()


class WrongBackward(MLPHalf):
    """Passes on a gradient that is as many times too large as there are processes."""

    def forward(self, x):
        return super().forward(Scaled.apply(x))


class PrivateGradient(MLPHalf):
    """Has a weight whose gradient `MissingAllReduce` does not average."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.contract.weight.is_private = True


class MissingSum(MLPHalf):
    """Leaves out the sum over the tensor-parallel ranks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.contract.__class__ = NoSum


class NoSum(RowParallelLinear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Hanging(MLPHalf):
    """Lets the last process wait for nobody."""

    def forward(self, x):
        if torch.distributed.get_rank() == 1:
            torch.distributed.barrier()
        return super().forward(x)


class Crashing(MLPHalf):
    def forward(self, x):
        if torch.distributed.get_world_size() > 1:
            raise ZeroDivisionError("on purpose")
        return super().forward(x)


own_seed, own_noise, wrong_backward = with_mlp(OwnSeed), with_mlp(OwnNoise), with_mlp(WrongBackward)
private_gradient, missing_sum = with_mlp(PrivateGradient), with_mlp(MissingSum)
hanging, crashing = with_mlp(Hanging), with_mlp(Crashing)


def failing(config):
    return [][len(config.model.args)]


class MissingAllReduce(LanguageModelTrial):
    """Leaves one weight out of the reduction over the replicas."""

    def __init__(self, context):
        super().__init__(context)
        from pipekit.engine.reduction import GradientReducer

        reducing = GradientReducer.reducing

        def reduce_others(self, parameters, *args, **options):
            others = [parameter for parameter in parameters if not hasattr(parameter, "is_private")]
            return reducing(self, others, *args, **options)

        GradientReducer.reducing = reduce_others


class TiedTwice(LanguageModelTrial):
    """Sums the gradients of tied copies once too often."""

    def __init__(self, context):
        super().__init__(context)
        from pipekit.engine.engine import PipelineEngine

        reduce = PipelineEngine._reduce_tied_gradients

        def reduce_twice(self):
            reduce(self)
            reduce(self)

        PipelineEngine._reduce_tied_gradients = reduce_twice


class OwnRate(LanguageModelTrial):
    """Learns at a rate that depends on the number of processes."""

    def learning_rate(self, step):
        return super().learning_rate(step) / torch.distributed.get_world_size()


class Infinite(LanguageModelTrial):
    def loss(self, outputs, labels):
        return super().loss(outputs, labels) * math.inf
'''


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a configuration, and models with a bug."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "text.txt").write_text("\n".join(f"line {i} of {i * i}" for i in range(3000)))
    (folder / "buggy.py").write_text(BUGGY)
    config = {
        "run": {"timeout_s": 60, "device": "cpu"},
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 32, "dropout": 0.1},
        "parallel": {"pp": 2, "schedule": "zb-h1"},
        "train": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 32},
        "optimizer": {"lr": 3e-3},
        "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    (folder / "own.yaml").write_text(yaml.safe_dump({**config, "model": "buggy:sound"}))
    return folder


def verify(workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    before = files(workspace)
    (workspace / "tmp").mkdir(exist_ok=True)
    environ = {"TMPDIR": str(workspace / "tmp")}
    done = run_pipekit(["verify", *arguments], cwd=workspace, environ=environ, timeout_s=580)
    assert list((workspace / "tmp").glob("pipekit-verify*")) == []
    assert files(workspace) == before
    return done


def files(workspace: Path) -> set[Path]:
    """Return what lies in the workspace, but for caches."""
    paths = {path.relative_to(workspace) for path in workspace.rglob("*")}
    return {path for path in paths if not {"cache", "tmp", "__pycache__"} & set(path.parts)}


def first_difference(workspace: Path, layout: str, *overrides: str, builder: str = "sound") -> dict[str, Any]:
    """Verify a model with a bug under one layout, and return what is said of it."""
    model = f"model.builder=buggy:{builder}"
    done = verify(workspace, "own.yaml", model, *overrides, "--steps", "2", "--layouts", layout, "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)["layouts"]
    assert found["verdict"] == "differs", found
    difference: dict[str, Any] = found["first_difference"]
    return difference


def test_a_sound_model_is_the_same_under_every_layout(workspace: Path) -> None:
    done = verify(workspace, "c.yaml", "--layouts", "pp2,dp2,pp2xdp2,dp3")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for layout in ("pp=2 ", "dp=2 ", "pp=2 x dp=2 "):
        (row,) = (line for line in lines if line.split("  ")[1:2] == [layout.strip()])
        errors = [float(word) for word in row.removeprefix(f"  {layout}").split()[2:6]]
        assert max(errors) < 1e-5
        assert row.endswith("agrees")
    assert "dp=3: train.global_batch_size=8 is not a multiple of train.micro_batch_size=2 x dp=3" in done.stdout
    assert lines[-1] == "all 3 layouts train the same model as one process"


@pytest.mark.slow
def test_tensor_parallel_layouts_and_every_zero_stage(workspace: Path) -> None:
    done = verify(workspace, "c.yaml", "--json", "--steps", "2", "--layouts", "pp2xtp2,dp2xzero0,dp2xzero2,dp2xzero3")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["agrees"]
    assert [entry["layout"]["zero"] for entry in found["layouts"]] == [1, 0, 2, 3]
    assert {entry["verdict"] for entry in found["layouts"]} == {"agrees"}
    for entry in found["layouts"]:
        assert 0 <= max(entry[column] for column in ("loss", "outputs", "gradients", "weights")) < 1e-5
        assert entry["gradients"] > 0
    assert any("model.dropout=0.1 was set to 0" in note for note in found["notes"])


@pytest.mark.slow
def test_frozen_parameters_are_verified_like_others(workspace: Path) -> None:
    frozen = 'train.freeze=["embed.*", "blocks.0.*", "*.norm.*"]'
    done = verify(workspace, "c.yaml", frozen, "--json", "--steps", "2", "--layouts", "pp2,pp2xtp2,dp2xzero3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {entry["verdict"] for entry in json.loads(done.stdout)["layouts"]} == {"agrees"}


@pytest.mark.slow
@pytest.mark.parametrize("data", [["data.packing=best-fit"], []], ids=["best-fit", "concat"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_documents_that_are_kept_apart_are_so_under_every_axis(workspace: Path, family: str, data: list[str]) -> None:
    # Sequences have different numbers of labels.
    (workspace / "lines.jsonl").write_text("\n".join(json.dumps({"text": "word " * (i % 13 + 2)}) for i in range(400)))
    changes = [f"model.family={family}", "data.source=lines.jsonl", "data.document_mask=true", *data]
    done = verify(workspace, "c.yaml", *changes, "--json", "--steps", "2", "--layouts", "pp2xtp2,pp2xdp2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["verdict"] for entry in json.loads(done.stdout)["layouts"]] == ["agrees"] * 2


def test_a_layer_that_does_not_keep_documents_apart_is_named(workspace: Path) -> None:
    done = run_pipekit(["plan", "own.yaml", "data.document_mask=true", "model.builder=buggy:own_noise"], cwd=workspace)
    assert done.returncode == 2
    assert "layer 'blocks.1.mlp' (OwnNoise) does not say that it keeps documents apart" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", [*find_families(), "gpt2 model.sparse_attention={mode: bigbird, block: 4}"])
def test_every_family_is_the_same_under_every_axis(workspace: Path, family: str) -> None:
    changes = f"model.family={family}".split(" ", 1)
    done = verify(workspace, "c.yaml", *changes, "--json", "--steps", "2", "--layouts", "pp2xtp2,dp2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["verdict"] for entry in json.loads(done.stdout)["layouts"]] == ["agrees"] * 2


def test_what_was_recorded_can_be_kept(workspace: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    done = verify(workspace, "c.yaml", "--steps", "1", "--layouts", "pp2", "--keep", str(kept))
    assert done.returncode == 0, done.stderr
    assert (kept / "reference" / "rank-0" / "index.jsonl").is_file()
    assert (kept / "pp2" / "zero1" / "logs" / "rank-1.log").is_file()
    assert "already exists" in verify(workspace, "c.yaml", "--layouts", "pp2", "--keep", str(kept)).stderr


@pytest.mark.parametrize(
    ("builder", "layout", "overrides", "kind", "tensor", "ranks", "words"),
    [
        ("own_seed", "pp2", [], "initial weights", "blocks.1.mlp.expand.weight", [1], "train.seed and its name alone"),
        ("own_noise", "dp2", [], "output", "", [1], "random numbers that it draws from a generator of its own"),
        ("wrong_backward", "pp2", [], "input gradient", "", [1], "what its backward makes of that is wrong"),
        (
            "private_gradient",
            "dp2",
            ["run.trial=buggy:MissingAllReduce"],
            "gradient",
            "blocks.1.mlp.contract.weight",
            [0, 1],
            "they were not averaged over parallel.dp",
        ),
        (
            "missing_sum",
            "tp2",
            ["parallel.sequence_parallel=false"],
            "output",
            "",
            [0, 1],
            "its tensor-parallel ranks return different results, which were not summed or gathered",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_a_bug_is_found_and_its_layer_named(
    workspace: Path,
    builder: str,
    layout: str,
    overrides: list[str],
    kind: str,
    tensor: str,
    ranks: list[int],
    words: str,
) -> None:
    found = first_difference(workspace, layout, *overrides, builder=builder)
    assert (found["kind"], found["layer"], found["tensor"]) == (kind, "blocks.1.mlp", tensor)
    assert found["step"] == 0
    assert found["ranks"] == ranks
    assert words in found["cause"]


def test_a_tied_gradient_that_is_counted_twice(workspace: Path) -> None:
    found = first_difference(workspace, "pp2", "run.trial=buggy:TiedTwice")
    assert (found["kind"], found["tensor"], found["other_layers"]) == ("gradient", "embed.weight", [])
    assert found["ratio"] == pytest.approx(2.0)
    assert "counted twice: embed is tied" in found["cause"]


def test_an_update_that_depends_on_the_layout(workspace: Path) -> None:
    found = first_difference(workspace, "dp2", "run.trial=buggy:OwnRate")
    assert (found["kind"], found["step"]) == ("weights", 0)
    assert found["ratio"] == pytest.approx(0.5)
    assert "learning rate" in found["cause"]


def test_a_layout_that_fails_does_not_keep_the_others_from_running(workspace: Path) -> None:
    done = verify(
        workspace, "own.yaml", "model.builder=buggy:crashing", "--steps", "1", "--layouts", "pp2,dp2", "--json"
    )
    assert done.returncode == 1
    failed = json.loads(done.stdout)["layouts"]
    assert [entry["verdict"] for entry in failed] == ["failed", "failed"]
    assert all("ZeroDivisionError: layer 'blocks.1.mlp': on purpose" in entry["failure"] for entry in failed)


@pytest.mark.slow  # it fails in the end, as in the test above
def test_a_layout_that_hangs_is_given_up(workspace: Path) -> None:
    arguments = ["own.yaml", "model.builder=buggy:hanging", "run.timeout_s=8", "--steps", "1", "--layouts", "pp2"]
    done = verify(workspace, *arguments)
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("pp=2 failed\n")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["c.yaml", "train.setps=3"], ["train.setps=3", "did you mean 'train.steps'"]),
        (["c.yaml", "--layouts", "pp"], ["--layouts pp", "for example --layouts pp2,dp2xzero0,pp2xdp2"]),
        (["c.yaml", "--layouts", "pp9,dp3"], ["no layout fits 4 devices", "pp=9: needs 9 processes", "dp=3: train."]),
        (["own.yaml", "model.builder=buggy:failing"], ["model.builder=buggy:failing: it failed in", "IndexError"]),
        (["own.yaml", "model.builder=buggy:none"], ["model.builder=buggy:none", "has no 'none'"]),
        (
            ["own.yaml", "run.trial=buggy:Infinite", "--layouts", "pp2"],
            ["one process", "the loss of step 1 is inf", "nothing to compare with"],
        ),
    ],
    ids=["key", "layouts", "nothing fits", "builder", "name", "infinite"],
)
def test_mistakes_are_one_message_and_exit_code_2(workspace: Path, arguments: list[str], parts: list[str]) -> None:
    done = verify(workspace, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error:") == 1
    for part in parts:
        assert part in done.stderr
