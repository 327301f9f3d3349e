"""Checkpoints that DeepSpeed itself writes, against what its engines hold, and what goes on from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import gpt2_script
from gloo_workers import GlooWorkers
from pipekit.checkpoint.migrate import migrate
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.cli import app
from pipekit.errors import CheckpointError, ConfigError
from pipekit.inference.export import export_checkpoint

pytestmark = pytest.mark.distributed

VOCAB, WIDTH = 11, 6


def scores(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return F.linear(x, embedding.weight)


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def layers() -> list[Any]:
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    return [
        TiedLayerSpec("embed", nn.Embedding, VOCAB, WIDTH),
        LayerSpec(nn.Linear, WIDTH, WIDTH),
        nn.GELU(),
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("embed", nn.Embedding, VOCAB, WIDTH, forward_fn=scores),
    ]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, 7)
        self.head = nn.Linear(7, VOCAB, bias=False)
        self.register_buffer("scale", torch.ones(3, dtype=torch.int32))
        self.body.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.gelu(self.body(self.embed(x))))
        return logits


def batches(step: int, replica: int, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(10 * step + replica)
    for _ in range(number):
        x = torch.randint(VOCAB, (2, 5), generator=generator)
        yield x, (x * 3) % VOCAB


def config(zero: int, precision: str) -> dict[str, Any]:
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
    }


def write(
    rank: int, folder: str, pp: int, zero: int, precision: str
) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """Train under DeepSpeed, save, and train on; return what it held as it saved, and the losses after that."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    import deepspeed
    from pipekit.deepspeed.patches import use_joined_processes

    use_joined_processes()
    torch.manual_seed(0)
    model = PipelineModule(layers(), num_stages=pp, loss_fn=loss_fn) if pp else Plain()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config(zero, precision))
    number = engine.gradient_accumulation_steps()
    replica = engine.grid.get_data_parallel_rank() if pp else rank

    def train(step: int) -> float:
        data = batches(step, replica, number)
        if pp:
            return float(engine.train_batch(data))
        for x, y in data:
            loss = loss_fn(engine(x), y)
            engine.backward(loss)
            engine.step()
        return float(loss)

    for step in range(3):
        train(step)
    held: dict[str, dict[str, Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in engine.module.named_parameters():
        if not zero:
            held["weights"][name] = parameter.detach().clone()
        elif parameter.requires_grad:
            held["weights"][name] = safe_get_full_fp32_param(parameter).clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                held[kind][name] = safe_get_full_optimizer_state(parameter, kind).clone()
    engine.save_checkpoint(folder, tag="mine", client_state={"epoch": 3})
    return held, [train(step) for step in (3, 4)]


def go_on(rank: int, folder: str, pp: int, zero: int) -> list[float]:
    """Train on under pipekit from what was migrated."""
    import pipekit

    module = pipekit.PipelineModule(layers(), num_stages=pp, loss_fn=loss_fn)
    engine, *_ = pipekit.initialize(model=module, config=config(zero, "fp32"))
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    number, losses = engine.micro_batches, []
    for step in (3, 4):
        replica = engine.mpu.data_parallel_rank
        every = [batch for r in range(2) for batch in batches(step, r, 4 // 2)]
        data = every[replica * number : (replica + 1) * number]
        losses.append(float(engine.train_batch(iter(data))))
    return losses


@pytest.mark.parametrize(
    ("world_size", "pp", "zero", "precision"),
    [
        (4, 2, 1, "fp32"),
        (2, 0, 2, "bf16"),
        (2, 0, 3, "fp32"),
        pytest.param(2, 2, 0, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 0, 0, "fp32", marks=pytest.mark.slow),
        pytest.param(4, 2, 1, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 0, 1, "fp32", marks=pytest.mark.slow),
        pytest.param(4, 0, 1, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 0, 3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_what_an_engine_held_is_read(
    gloo: GlooWorkers, tmp_path: Path, world_size: int, pp: int, zero: int, precision: str
) -> None:
    results = gloo.run(world_size, write, str(tmp_path / "theirs"), pp, zero, precision)
    found = migrate(tmp_path / "theirs", tmp_path / "run")
    assert found.path == tmp_path / "run/checkpoints/step-00000003"
    reader = CheckpointReader(found.path)
    expected: dict[str, dict[str, Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for held, _ in results:
        for kind, tensors in held.items():
            for name, tensor in tensors.items():
                tied = name.removeprefix("tied_modules.")
                # Without ZeRO nothing tells that the first layer is tied.
                tied = "layers.0.weight" if not zero and tied != name else tied
                expected[kind].setdefault(tied if tied != name or not pp else f"layers.{name}", tensor)
    names = set(expected["weights"])
    if not pp:
        names |= {"scale", "body.bias"}
        assert {name for name, entry in reader.manifest.tensors.items() if entry.trainable} >= {"head.weight"}
        assert not reader.manifest.tensors["scale"].trainable
        assert reader.tensor("scale").dtype is torch.int32
    assert reader.manifest.tensors.keys() == names
    for kind, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(reader.tensor(name, kind), tensor.float()), (kind, name)
    training = reader.manifest.training
    assert (training.step, training.consumed_samples) == (3, 24)
    assert training.optimizer["states"] == (["exp_avg", "exp_avg_sq"] if zero else [])
    assert any("begins anew" in note for note in found.notes) == (not zero)


def test_a_ported_script_goes_on_at_another_layout_with_the_same_losses(gloo: GlooWorkers, tmp_path: Path) -> None:
    ((_, expected), *_) = gloo.run(4, write, str(tmp_path / "theirs"), 2, 1, "fp32")
    migrate(tmp_path / "theirs", tmp_path / "run")
    for world_size, pp, zero in ((2, 2, 0), (2, 1, 1)):
        for losses in gloo.run(world_size, go_on, str(tmp_path / "run/checkpoints"), pp, zero):
            assert losses == pytest.approx(expected, rel=1e-5)


def train_gpt2(rank: int, folder: str) -> Tensor | None:
    """Train a GPT-2 of DeepSpeed's specs under DeepSpeed, save, and return the logits of its engine, if it has them."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    import deepspeed
    from pipekit.deepspeed.patches import use_joined_processes

    use_joined_processes()
    torch.manual_seed(0)
    module = PipelineModule(gpt2_script.layers(LayerSpec, TiedLayerSpec), num_stages=2, loss_fn=loss_fn)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config={**config(1, "fp32"), "train_batch_size": 2}
    )
    for step in range(3):
        engine.train_batch(batches(step, 0, 1))
    engine.save_checkpoint(folder)
    _, logits = engine.eval_batch(batches(3, 0, 1), return_logits=True)
    return None if logits is None else logits.detach().clone()


def test_a_gpt2_of_a_deepspeed_script_goes_to_transformers(gloo: GlooWorkers, tmp_path: Path) -> None:
    _, expected = gloo.run(2, train_gpt2, str(tmp_path / "theirs"))
    file = tmp_path / "gpt2.yaml"
    file.write_text(yaml.safe_dump({"model": gpt2_script.MODEL, "train": {"sequence_length": gpt2_script.SEQUENCE}}))
    done = CliRunner().invoke(app, ["migrate", str(tmp_path / "theirs"), str(tmp_path / "told"), "--config", str(file)])
    assert done.exit_code == 0, done.output
    migrate(tmp_path / "theirs", tmp_path / "untold")
    # What the checkpoint itself names is code of unknown origin; what stands in a file of the user's own is not.
    with pytest.raises(CheckpointError, match="--trust-code"):
        export_checkpoint(tmp_path / "told", tmp_path / "refused")
    export_checkpoint(tmp_path / "told", tmp_path / "a", trust_code=True)
    export_checkpoint(tmp_path / "untold", tmp_path / "b", config=file)
    ((prompt, _),) = batches(3, 0, 1)
    for out in (tmp_path / "a", tmp_path / "b"):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(out)(prompt).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_configuration_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = save_plain(tmp_path / "theirs")
    model = {"vocab_size": 3, "hidden_size": 2, "num_layers": 1, "num_heads": 1, "max_positions": 8}
    with pytest.raises(
        ConfigError, match=r"with position\.weight \(8, 2\), and .*theirs does not hold it, but head\.weight"
    ):
        migrate(source, tmp_path / "run", config={"model": model})
    assert not (tmp_path / "run").exists()


class Harm:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch harmed",)


def save_plain(folder: Path, *, optimizer_file: Any = None, **values: Any) -> Path:
    module = {"embed.weight": torch.randn(3, 2), "head.weight": torch.randn(3, 2)}
    state = {"module": module, "global_steps": 7, "global_samples": 56, "buffer_names": [], **values}
    folder.mkdir()
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    if optimizer_file is not None:
        torch.save(optimizer_file, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


def test_the_command_renames_and_says_what_it_wrote(tmp_path: Path) -> None:
    source = save_plain(tmp_path / "theirs")
    arguments = ["migrate", str(source), str(tmp_path / "run"), "--rename", "embed=tokens", "--rename", "head=out.proj"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "step 7, 2 tensors of 12 elements" in re.sub(r"\s+", " ", done.output)
    assert "optimizer states: none" in done.output
    reader = CheckpointReader(tmp_path / "run/checkpoints/step-00000007")
    assert reader.manifest.tensors.keys() == {"tokens.weight", "out.proj.weight"}


@pytest.mark.parametrize(
    ("values", "renames", "message"),
    [
        ({"epoch": Harm()}, {}, r"holds an object of (posix|os)\.system, whose code"),
        ({}, {"body": "x"}, r"--rename body=x: no tensor is called body or body\.\*"),
        ({}, {"embed": "head"}, r"two different tensors would be called head\.weight"),
        ({"param_shapes": [{}], "optimizer_file": {}}, {}, "has no 'optimizer_state_dict' where DeepSpeed"),
        (
            {"param_shapes": [{}], "optimizer_file": []},
            {},
            r"optim_states\.pt: holds list, and DeepSpeed writes a dict",
        ),
        ({"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}}, {}, "tensor-parallel ranks"),
        ({"param_shapes": [{"embed.weight": torch.Size([3, 2])}]}, {}, r"holds 0 \*_optim_states\.pt"),
    ],
)
def test_what_cannot_be_read_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], renames: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = save_plain(tmp_path / "theirs", **values)
    with pytest.raises(CheckpointError, match=message):
        migrate(source, tmp_path / "run", renames=renames)
    assert not (tmp_path / "harmed").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_folders_that_are_no_checkpoint_of_deepspeed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        migrate(tmp_path / "none", tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint of DeepSpeed"):
        migrate(tmp_path, tmp_path / "run")
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="is no folder beside it"):
        migrate(tmp_path, tmp_path / "run")
    source = save_plain(tmp_path / "theirs")
    file = source / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt: cut short or damaged"):
        migrate(source, tmp_path / "run")
