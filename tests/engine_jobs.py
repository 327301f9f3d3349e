"""Jobs of the ranks of engine tests, and the single process that they are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.config import parse_config
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec
from pipekit.models import find_families
from pipekit.models.family import TransformerFamily
from pipekit.models.transformer import language_model_loss
from pipekit.settings.activations import ActivationCheckpointing

VOCAB, SEQUENCE, GLOBAL_BATCH = 67, 16, 8


@dataclass(frozen=True)
class Case:
    """One way to train the test model."""

    family: str = "gpt2"
    pp: int = 1
    dp: int = 1
    tp: int = 1
    sequence_parallel: bool = True
    num_kv_heads: int | None = None
    loss_chunk_tokens: int | None = None
    zero: int = 1
    micro_batch_size: int = 1
    precision: str = "fp32"
    tied: bool = True
    dropout: float = 0.0
    clip: float = 0.5
    checkpointing: ActivationCheckpointing | bool = False
    steps: int = 4
    optimizer: str = "adamw"
    lr: float = 5e-3
    boundaries: tuple[int, ...] | None = None
    schedule: str = "1f1b"
    offload: str = "none"
    compile: bool = False
    preset: str | None = None

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp


def model_specs(case: Case) -> list[LayerSpec]:
    return model_of(case).layer_specs(loss_chunk_tokens=case.loss_chunk_tokens)


def model_of(case: Case) -> TransformerFamily:
    if case.preset is not None:
        return find_families()[case.family](preset=case.preset, vocab_size=VOCAB, dropout=case.dropout)
    return find_families()[case.family](
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        **({} if case.num_kv_heads is None else {"num_kv_heads": case.num_kv_heads}),
        max_positions=SEQUENCE,
        tied_embedding=case.tied,
        dropout=case.dropout,
        init_std=0.1,
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(VOCAB, (GLOBAL_BATCH, SEQUENCE), generator=generator)
    return inputs, (inputs * 3 + 1) % VOCAB


def micro_batches(step: int, case: Case, dp_rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    inputs, labels = batch(step)
    share = GLOBAL_BATCH // case.dp
    for first in range(dp_rank * share, (dp_rank + 1) * share, case.micro_batch_size):
        chosen = slice(first, first + case.micro_batch_size)
        yield inputs[chosen], labels[chosen]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adagrad": {"type": "adagrad", "eps": 1e-5},
    "adadelta": {"type": "adadelta"},
    "adamax": {"type": "adamax", "eps": 1e-5},
    "asgd": {"type": "asgd", "args": {"t0": 2.0}},
    "lamb": {"type": "lamb", "eps": 1e-5},
    "lion": {"type": "lion"},
    # In 16 bits, rounding makes more of the differences between layouts.
    "muon": {"type": "muon", "eps": 1e-5, "args": {"ns_dtype": "float32"}},
    "nadam": {"type": "nadam", "eps": 1e-5},
    "radam": {"type": "radam", "eps": 1e-5},
    "rmsprop": {"type": "rmsprop", "eps": 1e-4, "momentum": 0.8, "args": {"centered": True}},
    "rprop": {"type": "rprop"},
}
"""Sections by which `Case.optimizer` names more than the two that most tests use."""


def make_optimizer(case: Case, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if case.optimizer not in ("adamw", "sgd"):
        from pipekit.config.optimizer_config import OptimizerConfig
        from pipekit.training.optimizer import build_optimizer

        return build_optimizer(
            OptimizerConfig.model_validate({"lr": case.lr, **OPTIMIZERS[case.optimizer]}), parameters
        )
    if case.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    # Adam divides a gradient by its own size plus eps. With the usual eps of 1e-8, a gradient that is hardly more than
    # rounding error, such as that of the keys' bias in attention, moves its weight by up to a full step; with this one
    # weights differ between layouts by as little as their gradients do.
    return torch.optim.AdamW(groups, lr=case.lr, eps=1e-5)


def train_plain(model: nn.Module, case: Case, steps: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps of what a model trains, in one process with nothing but torch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses, norms = make_optimizer(case, trained), [], []
    for step in range(steps):
        inputs, labels = batch(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained, case.clip or float("inf"))))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def reference_run(case: Case, specs: list[LayerSpec] | None = None) -> dict[str, Any]:
    """Train in one process with nothing but torch: whole batch at once, `clip_grad_norm_`, the optimizer's own step."""
    model = SequentialModel(specs or model_specs(case), seed=1)
    losses, norms = train_plain(model, case, case.steps)
    weights = {name: tensor.detach().clone() for name, tensor in model.logical_tensors().items()}
    return {"losses": losses, "norms": norms, "weights": weights}


def show(case: Case) -> str:
    """Values of a case that are not the defaults, for the names of tests."""
    default = Case()
    changed = {key: value for key, value in vars(case).items() if value != getattr(default, key)}
    return "-".join(f"{key}={value}" for key, value in changed.items()) or "default"


_reference = cache(reference_run)


def reference(case: Case) -> dict[str, Any]:
    """Results of one process with nothing but torch, whatever the layout of the case."""
    same = ("family", "tied", "clip", "optimizer", "lr", "num_kv_heads", "steps", "preset")
    return _reference(Case(**{name: getattr(case, name) for name in same}))


def assert_trained_as_one_process(results: list[dict[str, Any]], case: Case, tolerance: float = 1e-4) -> None:
    """Compare losses, gradient norms and final weights of `train_job`, each to a relative tolerance."""
    expected = reference(case)
    for result in results:
        for kind in ("losses", "norms"):
            difference = max(abs(ours / theirs - 1) for ours, theirs in zip(result[kind], expected[kind], strict=True))
            assert difference <= tolerance, f"{kind} differ by {difference:.1e}"
        for name, weights in result["weights"].items():
            theirs = expected["weights"][name]
            # Gemma's norms count from 1.
            offset = float(case.family.startswith("gemma") and name.endswith("norm.weight"))
            difference = float((weights - theirs).norm() / (theirs + offset).norm())
            assert difference <= tolerance, f"{name} differs by {difference:.1e}"
    held = {name for result in results for name in result["weights"]}
    assert held == expected["weights"].keys()


def assert_trained_nearly(
    results: list[dict[str, Any]], expected: dict[str, Any], kind: str, precision: str, *, start: int = 0
) -> None:
    """Compare losses and gradient norms from step `start` on, and tensors of a kind, as near as a precision allows."""
    tolerance = 2e-2 if precision != "fp32" else 1e-4
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"][start:], rel=tolerance)
        assert result["norms"] == pytest.approx(expected["norms"][start:], rel=5 * tolerance)
        for name, tensor in result[kind].items():
            theirs = expected[kind][name]
            assert float((tensor - theirs).norm()) <= 10 * tolerance * float(theirs.norm()), name


def train_steps(engine: Any, case: Case, stop: int) -> tuple[list[float], list[float]]:
    """Train up to a step, and return the losses and gradient norms; replicas are compared after each."""
    losses, norms = [], []
    for step in range(engine.global_steps, stop):
        losses.append(float(engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank))))
        norms.append(engine.grad_norm)
        engine.check_replicas()
    return losses, norms


def build_engine(
    case: Case,
    specs: list[LayerSpec] | None = None,
    loss_fn: Any = language_model_loss,
    unit: Any = None,
    extra: dict[str, Any] | None = None,
    profile: bool = False,
    device: str | torch.device = "cpu",
    loss_weight: Any = None,
) -> Any:
    from pipekit.deepspeed.deepspeed_config import plan_deepspeed_config
    from pipekit.distributed.mpu import ModelParallelUnit
    from pipekit.engine import build
    from pipekit.engine.module import PipelineModule
    from pipekit.layout import Layout
    from pipekit.partitioners import partition_uniform
    from pipekit.schedules import default_stages_per_rank, schedule_placement

    if case.precision == "fp16":
        # DeepSpeed refuses fp16 on processors without fp16 instructions; torch computes it all the same.
        from deepspeed.accelerator import get_accelerator

        type(get_accelerator()).is_fp16_supported = lambda self: True
    if extra is None and case.zero == 3:
        # Parameters as small as all of these would never be cut.
        extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    specs = specs or model_specs(case)
    placement = schedule_placement(case.schedule, pp=case.pp, stages_per_rank=default_stages_per_rank(case.schedule))
    unit = unit or ModelParallelUnit(Layout(pp=case.pp, dp=case.dp, tp=case.tp), placement=placement)
    deepspeed_config = plan_deepspeed_config(
        micro_batch_size=case.micro_batch_size,
        num_micro_batches=GLOBAL_BATCH // (case.micro_batch_size * case.dp),
        precision=case.precision,  # type: ignore[arg-type]
        zero=case.zero,
        gradient_clipping=case.clip,
        extra=extra or {},
        offload=case.offload,  # type: ignore[arg-type]
        nvme_dir=tempfile.gettempdir(),
        device=torch.device(device).type,  # type: ignore[arg-type]
    )
    module = PipelineModule(
        specs,
        mpu=unit,
        boundaries=case.boundaries or partition_uniform(len(specs), len(placement)),
        loss_fn=loss_fn,
        base_seed=1,
        checkpointing=ActivationCheckpointing() if case.checkpointing is True else case.checkpointing or None,
        device=device,
        sequence_parallel=case.sequence_parallel,
        schedule=case.schedule,
        compile_layers=case.compile,
        loss_weight=loss_weight,
        deepspeed_config=deepspeed_config,
    )
    return build.build_engine(
        module,
        deepspeed_config=deepspeed_config,
        build_optimizer=lambda parameters: make_optimizer(case, parameters),
        measure_costs=case.schedule == "auto",
        profile=profile,
    )


def train(
    rank: int,
    case: Case,
    *,
    save: str | None = None,
    save_after: int = 2,
    load: str | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Train, and return losses, gradient norms, an evaluation, and this stage's fp32 weights."""
    from pipekit.checkpoint.reader import CheckpointReader
    from pipekit.engine.load import load_checkpoint
    from pipekit.engine.tensor_group import join_shards

    engine = build_engine(case, device=device)
    start = load_checkpoint(engine, CheckpointReader(Path(load))).step if load else 0
    losses, norms = [], []
    for step in range(start, case.steps):
        data = micro_batches(step, case, engine.mpu.data_parallel_rank)
        losses.append(float(engine.train_batch(data)))
        engine.check_replicas()
        norms.append(engine.grad_norm)
        if save is not None and step + 1 == save_after:
            values = {"model": model_of(case), "train": {"steps": case.steps, "sequence_length": SEQUENCE}}
            save_engine(engine, Path(save), step + 1, config_yaml=parse_config(values).to_yaml())
    evaluation = float(engine.eval_batch(micro_batches(10_000, case, engine.mpu.data_parallel_rank)))
    weights = {
        name: join_shards(engine.view.full_master(parameter), parameter, engine.module.tensor_group).to(
            "cpu", copy=True
        )
        for name, parameter, _ in engine.module.named_logical_parameters()
    }
    return {"losses": losses, "norms": norms, "evaluation": evaluation, "weights": weights}


def train_job(rank: int, case: Case, options: dict[str, Any]) -> dict[str, Any]:
    return train(rank, case, **options)


def compiling_adam(rank: int, job: Callable[..., Any], *args: Any) -> Any:
    """Do a job in which DeepSpeed's Adam for CPUs is compiled and updates what is offloaded; else torch's does."""
    import preloaded
    from pipekit.deepspeed import cpu_adam

    cpu_adam._reason_against_building = preloaded.reason_against_building_adam
    return job(rank, *args)


def training_state(engine: Any, step: int) -> Any:
    from pipekit.checkpoint.manifest import TrainingState

    return TrainingState(
        step=step,
        consumed_samples=step * GLOBAL_BATCH,
        seed=1,
        lr=5e-3,
        optimizer={"type": "adamw", "step": engine.view.step_count(), "states": engine.view.state_names()},
        loss_scaler=engine.view.loss_scaler_state(),
    )


def save_engine(
    engine: Any,
    folder: Path,
    step: int,
    background: Any = None,
    config_yaml: str = "model: {preset: tiny}\n",
    hosts: Any = None,
) -> Path:
    from pipekit.checkpoint.retention import Retention
    from pipekit.engine.save import save_checkpoint

    state, rule = training_state(engine, step), Retention(newest=2)
    saved = save_checkpoint(
        engine,
        folder,
        training=state,
        config_yaml=config_yaml,
        retention=rule,
        background=background,
        hosts=hosts,
    )
    return saved.wait()
