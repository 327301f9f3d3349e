"""What ranks hold, against running processes to the byte, and against what can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from engine_jobs import GLOBAL_BATCH, Case, batch, build_engine, micro_batches, model_specs
from gloo_workers import GlooWorkers
from pipekit.config import OptimizerConfig
from pipekit.errors import LayoutError
from pipekit.partitioners import partition_uniform
from pipekit.planner.layer_costs import LayerCosts
from pipekit.planner.memory import (
    _AHEAD,
    MemoryParts,
    Precision,
    Shape,
    StageContents,
    cut_stages,
    memory_of_stages,
    recomputation_bytes,
)
from pipekit.schedules import Action, plan_1f1b, plan_schedule, plan_zb_h1
from pipekit.sequential import SequentialModel
from pipekit.specs import layer_names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all storages, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def recording(found: list[Tensor]) -> Iterator[None]:
    """Collect what backwards keep of what runs inside."""

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def measured_layers(case: Case) -> list[LayerCosts]:
    """Run every layer by itself, and return what its backward keeps."""
    model = SequentialModel(model_specs(case), seed=1).to(DTYPES[case.precision])
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    x = batch(0)[0][: case.micro_batch_size]
    layers = []
    for step in model._steps:
        kept: list[Tensor] = []
        x = x.detach().requires_grad_(x.is_floating_point())
        with recording(kept):
            y = step(x)
        pointers = {tensor.untyped_storage().data_ptr() for tensor in kept}
        between = [
            tensor
            for tensor in kept
            if tensor.untyped_storage().data_ptr() not in weights | {x.data_ptr(), y.data_ptr()}
        ]
        layers.append(
            LayerCosts(
                parameters=0,
                forward_flops=0,
                input_gradient_flops=0,
                weight_gradient_flops=0,
                # Tokens are of the step, not of a micro-batch under way.
                input_bytes=num_bytes([x]) if x.is_floating_point() else 0,
                output_bytes=num_bytes([y]),
                saved_bytes=num_bytes(between),
                keeps_input=x.is_floating_point() and x.data_ptr() in pointers,
                keeps_output=y.data_ptr() in pointers,
            )
        )
        x = y
    return layers


def parameter_shapes(case: Case) -> list[dict[str, Shape]]:
    """Return each layer's parameters by logical name."""
    specs = model_specs(case)
    shapes = []
    for name, spec in zip(layer_names(specs), specs, strict=True):
        with torch.device("meta"):
            layer = spec.build()
        shapes.append({f"{name}.{path}": tuple(parameter.shape) for path, parameter in layer.named_parameters()})
    return shapes


def predicted(case: Case) -> list[tuple[MemoryParts, int]]:
    """Return for each rank of a pipeline what it holds, and how much of that is a recomputation."""
    schedule = plan_schedule(case.schedule, pp=case.pp, num_micro_batches=num_micro_batches(case))
    layers = measured_layers(case)
    boundaries = case.boundaries or partition_uniform(len(layers), schedule.num_stages)
    stages = cut_stages(layers, parameter_shapes(case), boundaries)
    optimizer = OptimizerConfig(type=case.optimizer, momentum=0.9)  # type: ignore[arg-type]
    precision: Precision = case.precision  # type: ignore[assignment]
    return [
        (
            memory_of_stages(
                stages, schedule, rank, precision=precision, zero=case.zero, dp=case.dp, optimizer=optimizer,
                checkpointing=case.checkpointing,
            ),
            max(recomputation_bytes(stages[stage].layers) for stage in schedule.stages_of(rank)),
        )
        for rank in range(case.pp)
    ]  # fmt: skip


def num_micro_batches(case: Case) -> int:
    return GLOBAL_BATCH // (case.micro_batch_size * case.dp)


class Probe:
    """Stands in for the stopwatch: how much is alive after every forward, and before gradients are given away."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in engine.module.parameters()}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._in_forward = False
        self.activations = self.gradients = 0
        layers = engine.module._layers
        engine.module._layers = {layer_idx: self._observed(layer) for layer_idx, layer in layers.items()}
        for name in ("accumulate", "hand_over_gradients"):
            setattr(engine.view, name, self._after_counting(getattr(engine.view, name)))
        engine.executor.stopwatch = self

    def _observed(self, layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            return self.note(layer(self.note(x)))

        return run

    def _after_counting(self, method: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self.gradients = max(self.gradients, num_bytes(gradients(self._engine)))
            method()

        return run

    def begin(self) -> None:
        self._seen = {}

    def start(self, action: Action) -> None:
        self._in_forward = action.kind == "F"

    def stop(self, action: Action) -> None:
        if self._in_forward:
            alive = sum(size for storage, size in self._seen.values() if not storage.expired())
            self.activations = max(self.activations, alive)
        self._in_forward = False

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._in_forward and tensor.is_floating_point() and storage.data_ptr() not in self._weights:
            weak = StorageWeakRef(storage)
            self._seen[weak.cdata] = weak, storage.nbytes()
        return tensor


def gradients(engine: Any) -> list[Tensor]:
    """Return every gradient that is held, wherever."""
    found: list[Any] = []
    for parameter in engine.module.parameters():
        found += [parameter.grad, getattr(parameter, "grad_accum", None), getattr(parameter, "_hp_grad", None)]
    found += getattr(engine.optimizer, "fp32_groups_gradients_flat", [])
    for pieces in getattr(engine.optimizer, "averaged_gradients", {}).values():
        found += pieces or []
    return [tensor for tensor in found if tensor is not None]


def measure(rank: int, case: Case) -> dict[str, int]:
    """Train two steps, and return what is held in the second."""
    engine = build_engine(case)
    engine.train_batch(micro_batches(0, case, engine.unit.data_parallel_rank))
    probe = Probe(engine)
    with torch.autograd.graph.saved_tensors_hooks(probe.note, lambda tensor: tensor):
        engine.train_batch(micro_batches(1, case, engine.unit.data_parallel_rank))
    weights = list(engine.module.parameters())
    torch_optimizer = engine.view.torch_optimizer
    masters = [parameter for group in torch_optimizer.param_groups for parameter in group["params"]]
    states = [value for state in torch_optimizer.state.values() for value in state.values()]
    return {
        "pipe_rank": engine.unit.pipe_rank,
        "weights": num_bytes(weights),
        "masters": num_bytes(weights + masters) - num_bytes(weights),
        "optimizer_states": num_bytes(state for state in states if isinstance(state, Tensor)),
        "gradients": probe.gradients,
        "activations": probe.activations,
    }


CASES = [
    Case(pp=2, zero=0),
    Case(pp=2, zero=1, checkpointing=True),
    Case(pp=4, zero=0, tied=False, checkpointing=True),
    Case(pp=4, zero=1, boundaries=(0, 4, 8, 9, 10)),
    Case(pp=2, dp=2, zero=0, optimizer="sgd"),
    Case(pp=2, dp=2, zero=1, tied=False),
    Case(dp=4, zero=1, micro_batch_size=2),
    Case(pp=2, precision="bf16", tied=False, checkpointing=True),
    Case(pp=4, precision="bf16", boundaries=(0, 4, 8, 9, 10)),
    Case(pp=2, dp=2, precision="bf16", zero=0),
    Case(pp=2, precision="fp16", schedule="gpipe"),
    Case(pp=2, schedule="interleaved-1f1b"),
    Case(pp=2, precision="bf16", schedule="interleaved-1f1b"),
    Case(pp=2, schedule="zb-h1", zero=0),
    Case(pp=2, schedule="zb-v", tied=False),
]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_running_processes_hold_what_was_predicted(gloo: GlooWorkers, case: Case) -> None:
    expected = predicted(case)
    for found in gloo.run(case.world_size, measure, case):
        parts, recomputation = expected[found["pipe_rank"]]
        for name in ("weights", "masters", "optimizer_states", "gradients"):
            assert found[name] == getattr(parts, name), name
        kept = parts.activations - (recomputation if case.checkpointing else 0)
        assert found["activations"] == pytest.approx(kept, rel=0.05)


LINEAR = LayerCosts(
    20, 40, 40, 40, input_bytes=16, output_bytes=20, saved_bytes=0, keeps_input=True, keeps_output=False
)
WIDE = replace(LINEAR, input_bytes=20, output_bytes=40, saved_bytes=1000, keeps_output=True)


def two_stages(pipe_rank: int = 0, **options: Any) -> MemoryParts:
    """Return what a rank of two holds: 21 elements that decay and 7 that do not on the first stage, 9 on the second."""
    stages = [
        StageContents([LINEAR], {"a.weight": (3, 7), "a.bias": (7,)}),
        StageContents([WIDE], {"b.weight": (3, 3)}),
    ]
    schedule = options.pop("schedule", plan_1f1b(num_stages=2, num_micro_batches=4))
    settings = {"precision": "fp32", "zero": 1, "dp": 1, **options}
    return memory_of_stages(stages, schedule, pipe_rank, **settings)


def test_groups_are_filled_up_to_the_alignment_of_all_replicas() -> None:
    # 21 and 7 elements; two for each replica: 22 + 8, 24 + 8 and 24 + 12.
    assert [two_stages(dp=dp).weights for dp in (1, 2, 3, 6)] == [4 * 30, 4 * 32, 4 * 36, 4 * 36]
    assert [two_stages(dp=dp).masters for dp in (1, 2, 3, 6)] == [4 * 30, 4 * 16, 4 * 12, 4 * 6]
    # Two moments, and a step count for each group.
    assert two_stages(dp=2).optimizer_states == 2 * 4 * 16 + 4 * 2
    assert two_stages(dp=2, zero=0).optimizer_states == 2 * 4 * 28 + 4 * 2
    assert two_stages(dp=2, zero=0).masters == 0


def test_moments_follow_from_the_optimizer() -> None:
    assert two_stages(optimizer=OptimizerConfig(type="sgd")).optimizer_states == 0
    assert two_stages(optimizer=OptimizerConfig(type="sgd", momentum=0.9)).optimizer_states == 4 * 30
    assert two_stages(optimizer=OptimizerConfig(type="adam")) == two_stages()


def test_16_bits_hold_masters_and_gradients_in_fp32() -> None:
    bf16, fp16 = (two_stages(precision=precision, zero=0) for precision in ("bf16", "fp16"))
    assert bf16.weights == fp16.weights == 2 * 30
    assert bf16.masters == fp16.masters == 4 * 30
    # The flat buffer and a backward's own gradients; in fp16 each parameter's go when they come.
    assert (bf16.gradients, fp16.gradients) == (4 * 30 + 2 * 28, 4 * 28)


def test_a_rank_without_parameters_has_an_idle_one() -> None:
    stages = [StageContents([LINEAR], {}), StageContents([WIDE], {"b.weight": (3, 3)})]
    schedule = plan_1f1b(num_stages=2, num_micro_batches=4)
    plain, sharded = (memory_of_stages(stages, schedule, 0, precision="fp32", zero=zero, dp=2) for zero in (0, 1))
    assert (plain.weights, plain.gradients, plain.optimizer_states) == (4, 0, 12)
    assert (sharded.weights, sharded.gradients, sharded.optimizer_states) == (16, 0, 20)


def test_parameters_that_two_stages_of_a_rank_share_are_there_once() -> None:
    layers, weight = [LINEAR, WIDE, WIDE, WIDE], {"embedding.weight": (5, 4)}
    stages = cut_stages(layers, [weight, {}, {}, weight], [0, 1, 2, 3, 4])
    schedule = plan_schedule("zb-v", pp=2, num_micro_batches=4)
    parts = memory_of_stages(stages, schedule, 0, precision="fp32", zero=0, dp=1)
    assert parts.weights == parts.gradients == 80


def test_activations_are_those_of_the_micro_batches_in_flight() -> None:
    assert two_stages().activations == 2 * (16 + 20)
    assert two_stages(1).activations == 20 + 1000 + 40
    # Recomputed is one layer at a time, its output too where it is kept.
    assert two_stages(1, checkpointing=True).activations == 20 + 40 + 1000 + 40
    # Logarithms of probabilities are kept in fp32: 20 logits of 2 bytes.
    assert two_stages(1, precision="bf16").activations == 20 + 1000 + 80


def test_split_backwards_keep_what_was_recomputed_until_the_weight_gradient() -> None:
    whole = two_stages(1, checkpointing=True).activations
    split = two_stages(1, checkpointing=True, schedule=plan_zb_h1(num_stages=2, num_micro_batches=4)).activations
    assert split >= whole + 1000


def test_the_last_stage_holds_the_gradients_of_its_logits_for_a_moment() -> None:
    assert (two_stages(0).logits, two_stages(1).logits) == (0, 2 * 4 * 10)
    assert two_stages(1, precision="bf16").logits == 2 * 4 * 20


def test_two_messages_are_received_ahead_and_gradients_are_passed_on() -> None:
    from pipekit.engine import channels

    # The message between the stages has 20 bytes. Rank 0 receives gradients, of which one more is in use.
    assert two_stages(0).communication == 2 * 20 + 20
    assert two_stages(1).communication == 2 * 20 + 20
    assert _AHEAD == channels._AHEAD


def test_the_reduction_and_the_update_come_after_the_activations() -> None:
    parts = two_stages(dp=2)
    assert parts.update == 4 * 28
    standing = parts.weights + parts.gradients + parts.optimizer_states + parts.masters
    assert parts.total == standing + max(parts.activations + parts.logits + parts.communication, parts.update)
    # A replica alone reduces nothing; ZeRO flattens the larger group's gradients.
    assert [two_stages(zero=zero).update for zero in (0, 1)] == [0, 4 * 22]
    assert two_stages(precision="bf16").update == 0


def test_zero_2_and_3_are_estimates() -> None:
    one, two, three = (two_stages(dp=2, zero=zero) for zero in (1, 2, 3))
    assert [parts.is_estimate for parts in (one, two, three)] == [False, True, True]
    assert one.gradients > two.gradients == three.gradients == 4 * 16
    assert one.weights == two.weights == 2 * three.weights


def test_stages_that_do_not_fit_the_schedule_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"2 stages do not fit the schedule 1f1b, which has 3; cut the layers"):
        two_stages(schedule=plan_1f1b(num_stages=3, num_micro_batches=4))
