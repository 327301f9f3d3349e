"""The first number of a step that is not finite, put into one place of one rank, and named."""

from __future__ import annotations

import math
import random
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_jobs import Case, build_engine, micro_batches, show
from gloo_workers import GlooWorkers
from pipekit.engine.step_trace import Diagnosis, Fault, Place, diagnose_step, find_first
from pipekit.models.transformer import language_model_loss

SEED = 20261126


@dataclass(frozen=True)
class Injury:
    """A number put into one tensor of one rank."""

    kind: str
    rank: int
    value: float
    step: int
    micro_batch: int
    choice: int  # of a layer, or of a part
    what: str = "output"  # or "weight" for a gradient, or "part"


def pick_layer(module: Any, injury: Injury) -> tuple[int, str, nn.Module | nn.Parameter]:
    """Layer index, name in words, and what to injure."""
    from pipekit.engine.step_trace import named_parameters

    if injury.kind == "weight" or injury.what == "weight":
        parameters = list(named_parameters(module))
        layer_idx, name, parameter = parameters[injury.choice % len(parameters)]
        full = f"{module.layer_names[layer_idx]}.{name}"
        return layer_idx, f"the {'weight' if injury.kind == 'weight' else 'gradient of'} {full}", parameter
    layer_idx = module.layer_indices[injury.choice % len(module.layer_indices)]
    layer = module.module_of(layer_idx)
    if injury.what == "part":
        parts = [(name, part) for name, part in layer.named_modules() if name and not list(part.children())]
        if parts:
            name, part = parts[injury.choice % len(parts)]
            return layer_idx, f"the output of {module.layer_names[layer_idx]}.{name}", part
    # A gradient that goes wrong in a layer shows in its parts or weights first.
    return layer_idx, f"the output of {module.layer_names[layer_idx]}" if injury.kind == "activation" else "", layer


class _Through(torch.autograd.Function):
    """The end of a layer, which changes the gradient that comes into it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, backward: Any) -> Tensor:
        ctx.change = backward
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def injure(engine: Any, injury: Injury) -> tuple[ExitStack, int, str]:
    """Injure this rank until the stack is closed; the layer and the tensor in words."""
    module, executor, stack = engine.module, engine.executor, ExitStack()
    layer_idx, words, target = pick_layer(module, injury)
    current = [-1, -1]  # the micro-batch of the forward, and of the backward that has reached the layer

    def note(original: Any, inputs: Any, **options: Any) -> Any:
        current[0] = options["dropout_path"][1] % engine.micro_batches
        return original(inputs, **options)

    forward = executor._forward
    executor._forward = lambda inputs, **options: note(forward, inputs, **options)
    stack.callback(setattr, executor, "_forward", forward)

    def poison(tensor: Tensor) -> Tensor:
        poisoned = tensor.clone()
        poisoned.view(-1)[0] = injury.value
        return poisoned

    def hook(part: nn.Module, inputs: Any, output: Any) -> Any:
        micro_batch = current[0]
        if injury.kind == "activation" and part is target:
            return poison(output) if micro_batch == injury.micro_batch else output

        def backward(gradient: Tensor) -> Tensor:
            current[1] = micro_batch
            hurts = injury.what != "weight" and micro_batch == injury.micro_batch
            return poison(gradient) if hurts else gradient

        return _Through.apply(output, backward)

    if injury.kind == "weight":
        assert isinstance(target, nn.Parameter)
        held = getattr(target, "ds_tensor", target.data)  # under ZeRO-3 a piece
        before = held.clone()
        # All of a table of embeddings, of which a batch may not need the one number.
        held.copy_(held.new_full(held.shape, injury.value) if "embed" in words else poison(held))
        stack.callback(held.copy_, before)
        return stack, layer_idx, words
    layer = target if isinstance(target, nn.Module) else module.module_of(layer_idx)
    stack.callback(layer.register_forward_hook(hook).remove)
    if isinstance(target, nn.Parameter):
        look = target.register_hook(lambda g: poison(g) if current[1] == injury.micro_batch else None)
        stack.callback(look.remove)
    return stack, layer_idx, words


def state_of(engine: Any) -> tuple[Any, ...]:
    return engine.global_steps, engine.skipped_steps, engine.global_samples, engine.view.loss_scaler_state()


def hurt(rank: int, case: Case, injuries: list[Injury]) -> list[Any]:
    """Train with one injury after the other; what was named, what is true, and whether training goes on unharmed."""
    engine = build_engine(case)
    results = []
    step = 0
    for injury in injuries:
        while step < injury.step:
            engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank))
            step += 1
        stack, told = ExitStack(), None
        if rank == injury.rank:
            stack, layer_idx, words = injure(engine, injury)
            stage = next(each for each in engine.module.stages if layer_idx in engine.module.layers_of(each))
            told = (engine.module.layer_names[layer_idx], words, injury.kind, rank, stage)
        skipped = engine.skipped_steps
        data = lambda: micro_batches(step, case, engine.mpu.data_parallel_rank)  # noqa: B023, E731
        with stack:
            engine.train_batch(data())
            assert engine.skipped_steps == skipped + 1, injury
            before = state_of(engine)
            fault = diagnose_step(engine, data, step=step).fault
            assert state_of(engine) == before
        step += 1
        results.append((fault, told))
    losses = [float(engine.train_batch(micro_batches(each, case, engine.mpu.data_parallel_rank))) for each in (90, 91)]
    return [results, losses, engine.skipped_steps]


def check(gloo: GlooWorkers, case: Case, injuries: list[Injury]) -> None:
    results = gloo.run(case.world_size, hurt, case, injuries)
    for index, injury in enumerate(injuries):
        (truth,) = [told for (_, told) in (result[0][index] for result in results) if told is not None]
        for result in results:
            fault = result[0][index][0]
            assert fault is not None, f"nothing is named: {injury}"
            what = fault.place.what if truth[1] else ""
            named = (fault.place.layer, what, fault.place.kind, fault.rank, fault.stage)
            assert named == truth, f"{named} is named, and it is {truth}: {injury}"
            assert fault.place.micro_batch == (None if injury.kind == "weight" else injury.micro_batch)
    # Nothing of it stays.
    assert all(result[2] == len(injuries) and all(map(math.isfinite, result[1])) for result in results)


QUICK = [
    (
        Case(tp=2, dropout=0.1, micro_batch_size=4),
        [Injury("activation", 1, math.nan, 1, 1, 1, what="part"), Injury("gradient", 0, math.inf, 2, 1, 2)],
    ),
    (
        Case(pp=2, schedule="zb-h1", checkpointing=True, precision="bf16", micro_batch_size=2),
        [Injury("gradient", 1, math.nan, 1, 3, 1, what="weight"), Injury("weight", 0, -math.inf, 2, 0, 3)],
    ),
]
MORE = [
    (
        Case(dp=2, zero=zero, micro_batch_size=2, precision=precision, offload=offload),
        [
            Injury("activation", 1, math.nan, 1, 1, 4),
            Injury("gradient", 0, math.inf, 2, 0, 3, what="weight"),
            Injury("weight", 1, math.nan, 3, 0, 5),
        ],
    )
    for zero, precision, offload in [
        (0, "fp32", "none"),
        (1, "fp32", "none"),
        (2, "bf16", "none"),
        (3, "fp32", "none"),
        (2, "fp32", "optimizer"),
        (3, "bf16", "none"),
        (1, "bf16", "none"),
    ]
] + [
    (
        Case(pp=2, schedule=schedule, micro_batch_size=2),
        [
            Injury("activation", 1, math.nan, 1, 3, 1),
            Injury("gradient", 0, math.nan, 2, 1, 2),
        ],
    )
    for schedule in ("interleaved-1f1b", "zb-v", "gpipe")
]


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "injuries"), QUICK, ids=[show(case) for case, _ in QUICK])
def test_the_first_number_that_is_not_finite_is_named(gloo: GlooWorkers, case: Case, injuries: list[Injury]) -> None:
    check(gloo, case, injuries)


MORE += [
    (
        Case(pp=2, precision="fp16", micro_batch_size=2),
        [Injury("activation", 1, math.nan, 2, 3, 1), Injury("weight", 0, math.inf, 3, 0, 2)],
    ),
    (
        Case(pp=2, compile=True, micro_batch_size=2),
        [Injury("gradient", 1, math.nan, 1, 1, 1, what="weight"), Injury("weight", 0, math.inf, 2, 0, 2)],
    ),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("case", "injuries"), MORE, ids=[show(case) for case, _ in MORE])
def test_it_is_named_under_every_schedule_and_zero(gloo: GlooWorkers, case: Case, injuries: list[Injury]) -> None:
    check(gloo, case, injuries)


LAYOUTS = [Case(pp=4), Case(pp=2, tp=2), Case(pp=2, dp=2)]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", LAYOUTS, ids=show)
def test_thirty_injuries_at_random(gloo: GlooWorkers, case: Case) -> None:
    draw = random.Random(f"{SEED} {show(case)}")
    print(f"seed {SEED}")
    injuries = []
    for step in range(10):
        kind = ("weight", "activation", "gradient")[step % 3]
        what = draw.choice(
            {"weight": ["output"], "activation": ["output", "part"], "gradient": ["output", "weight"]}[kind]
        )
        # Minus infinity is harmless where a softmax or a maximum follows.
        value = draw.choice([math.nan, math.inf])
        injuries.append(
            Injury(kind, draw.randrange(4), value, step, draw.randrange(8 // case.dp), draw.randrange(99), what)
        )
    check(gloo, case, injuries)


def fault(rank: int, place: Place) -> Fault:
    return Fault(place, rank, stage=0, replica=0)


def test_a_mask_inside_a_layer_counts_only_where_the_layer_is_wrong() -> None:
    mask = Place("activation", 0, 1, "blocks.1", "the output of scores", 2, is_inner=True)
    output = Place("activation", 0, 3, "blocks.3", "the output", 7)
    assert find_first([fault(0, mask), fault(0, output)]) == fault(0, output)


def test_forwards_come_before_backwards_and_micro_batches_in_their_order() -> None:
    forward = Place("activation", 1, 5, "head", "the output", 0)
    backward = Place("gradient", 1, 5, "head", "the gradient of the output", 0)
    earlier = replace(backward, layer_idx=6, layer="the loss")
    first = replace(backward, micro_batch=0, layer_idx=0, layer="embed")
    weight = Place("weight", None, 9, "blocks.9", "scale", 4)
    ordered = [fault(2, weight), fault(1, first), fault(0, forward), fault(3, earlier), fault(0, backward)]
    for index, expected in enumerate(ordered):
        assert find_first(ordered[index:][::-1]) == expected
    assert find_first([]) is None


def overflow_and_recover(rank: int) -> list[Diagnosis | None]:
    """Diagnoses of a norm that is too large, of a fault that does not come again, and where nothing can be repeated."""
    case = Case(micro_batch_size=8, dropout=0.1)
    changes: list[tuple[float, float]] = []
    losses: list[float] = []

    def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
        loss = language_model_loss(outputs, labels)
        losses.append(float(loss))
        factor, addend = changes.pop(0)
        return loss * factor + addend  # an addend has no part in the gradient

    engine, found = build_engine(case, loss_fn=loss_fn), []
    for step, changes[:] in enumerate([[(1e30, 0.0)] * 2, [(1.0, math.nan), (1.0, 0.0)], [(1.0, math.nan)]]):
        engine.train_batch(micro_batches(step, case, 0))
        assert engine.skipped_steps == step + 1
        if step == 2:
            engine.torch_autocast_z0_gradscaler = "a scaler of autocast's"
        found.append(diagnose_step(engine, lambda: micro_batches(step, case, 0), step=step))  # noqa: B023
    # With the random numbers of the step.
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    return found


@pytest.mark.distributed
def test_a_norm_that_is_too_large_and_a_fault_that_has_gone_are_told_apart(gloo: GlooWorkers) -> None:
    too_large, gone, unknown = gloo.run(1, overflow_and_recover)[0]
    assert too_large == Diagnosis(None, norm_is_finite=False)
    assert gone == Diagnosis(None)
    assert unknown is None
