"""Memory of ranks, against running processes to the byte, and against what can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine_jobs import GLOBAL_BATCH, VOCAB, Case, batch, build_engine, micro_batches, model_specs
from gloo_workers import GlooWorkers
from pipekit.errors import LayoutError
from pipekit.layers.freezing import freeze
from pipekit.layers.parameters import parameter_shapes, trained_and_frozen_shapes
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec, layer_names
from pipekit.models.transformer import language_model_loss
from pipekit.partitioners import partition_uniform
from pipekit.predictions.elements import Precision, count_elements
from pipekit.predictions.layer_costs import LayerCosts, recompute_layers
from pipekit.predictions.memory import (
    ADAM_STATES,
    MemoryParts,
    OptimizerStates,
    StageContents,
    peak_memory,
    recomputation_bytes,
    stage_contents,
)
from pipekit.schedules import Action, plan_1f1b, plan_schedule, plan_zb_h1
from pipekit.settings.activations import ActivationCheckpointing
from pipekit.tensors.weight_gradients import WeightGradients

STANDING = ("weights", "masters", "optimizer_states", "gradients")
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


def measured_layers(case: Case, specs: list[LayerSpec]) -> list[LayerCosts]:
    """Run every layer and the loss by itself, and return what its backward keeps; the loss comes last."""
    model = SequentialModel(specs, seed=1).to(DTYPES[case.precision])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # Tokens and labels are of the step, not of a micro-batch under way.
    x, labels = (tensor[: case.micro_batch_size] for tensor in batch(0))
    layers = []
    for step in [*model.steps, lambda logits: language_model_loss(logits, labels)]:
        kept: list[Tensor] = []
        is_float = x.is_floating_point()
        x = x.detach().requires_grad_(is_float)
        with recording(kept):
            y = step(x)
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept if tensor.is_floating_point()}
        own = [tensor for pointer, tensor in storages.items() if pointer not in {*weights, x.data_ptr(), y.data_ptr()}]
        layers.append(
            LayerCosts(
                parameters=0,
                forward_flops=0,
                input_gradient_flops=0,
                weight_gradient_flops=0,
                input_bytes=num_bytes([x]) if is_float else 0,
                output_bytes=num_bytes([y]),
                saved_bytes=num_bytes(own),
                keeps_input=x.data_ptr() in storages,
                keeps_output=y.data_ptr() in storages,
            )
        )
        x = y
    return layers


def predicted(case: Case, specs: list[LayerSpec] | None = None) -> list[tuple[MemoryParts, int]]:
    """Return for each rank of a pipeline what it holds, and how much of that is a recomputation."""
    specs = specs or model_specs(case)
    schedule = plan_schedule(case.schedule, pp=case.pp, num_micro_batches=num_micro_batches(case))
    *layers, loss = measured_layers(case, specs)
    setting = ActivationCheckpointing() if case.checkpointing is True else case.checkpointing or None
    layers = recompute_layers(layers, setting, layer_names(specs), tp=case.tp)
    boundaries = case.boundaries or partition_uniform(len(layers), schedule.num_stages)
    stages = stage_contents(layers, parameter_shapes(specs), boundaries)
    held = peak_memory(
        stages,
        schedule,
        loss=loss,
        precision=case.precision,  # type: ignore[arg-type]
        zero=case.zero,
        dp=case.dp,
        optimizer_states=OptimizerStates(1, 0) if case.optimizer == "sgd" else ADAM_STATES,
        offload=case.offload,  # type: ignore[arg-type]
    )
    recomputed = [recomputation_bytes(stage.layers) for stage in stages]
    return [(parts, max(recomputed[stage] for stage in schedule.stages_of(rank))) for rank, parts in enumerate(held)]


def num_micro_batches(case: Case) -> int:
    return GLOBAL_BATCH // (case.micro_batch_size * case.dp)


class Probe:
    """Stands in for the stopwatch: how much is alive after every forward, and before gradients are given away."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in engine.module.parameters()}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._outputs: dict[tuple[int, int], int] = {}
        self._passed_on = 0
        self._in_forward = False
        self.activations = self.gradients = self.largest_gradient = 0
        layers = engine.module._layers
        engine.module._layers = {layer_idx: self._observed(layer) for layer_idx, layer in layers.items()}
        engine.view.hand_over_gradients = self._after_counting(engine.view.hand_over_gradients)
        if engine.view.buffers is not None:
            engine.view.buffers._add = self._after_noting(engine.view.buffers._add)
        engine.executor.stopwatch = self

    def _observed(self, layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            return self.keep(layer(self.keep(x)))

        return run

    def _after_counting(self, method: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self.gradients = num_bytes(gradients(self._engine))
            if self._engine.view.buffers is None:
                self._note_gradients(parameter.grad for parameter in self._engine.module.parameters())
            method()

        return run

    def _after_noting(self, add: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
        def run(parameter: Tensor, gradient: Tensor) -> None:
            self._note_gradients([gradient])
            add(parameter, gradient)

        return run

    def _note_gradients(self, gradients: Iterable[Tensor | None]) -> None:
        """Note the largest gradient of one backward."""
        sizes = [num_bytes([gradient]) for gradient in gradients if gradient is not None]
        self.largest_gradient = max([self.largest_gradient, *sizes])

    def begin(self) -> None:
        self._seen, self._outputs = {}, {}

    def start(self, action: Action) -> None:
        self._in_forward = action.kind == "F"

    def stop(self, action: Action) -> None:
        if action.kind == "F":
            self._outputs[action.stage, action.micro_batch] = self._passed_on
        elif action.kind in "BI":
            # Gloo tells who waits for a send that it is done, and nobody else: what was sent lives as long as the step.
            self._seen.pop(self._outputs[action.stage, action.micro_batch], None)
        alive = sum(size for storage, size in self._seen.values() if not storage.expired())
        self.activations = max(self.activations, alive)
        self._in_forward = False

    def keep(self, tensor: Tensor) -> Tensor:
        """Take up what is saved in a forward."""
        if self._in_forward and isinstance(tensor, Tensor):
            self.note(tensor)
        return tensor

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in self._weights:
            weak = StorageWeakRef(storage)
            self._seen[weak.cdata] = weak, storage.nbytes()
            self._passed_on = weak.cdata


@contextmanager
def noting_deferred(probe: Probe) -> Iterator[None]:
    """Let the probe see the gradients of outputs, which linear layers keep until their weight gradients."""
    append = WeightGradients.append

    def noted(self: WeightGradients, weight: Tensor, compute: Any) -> None:
        probe.note(compute._grad)
        if hasattr(compute, "_inputs"):
            probe.note(compute._inputs())
        append(self, weight, compute)

    WeightGradients.append = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        WeightGradients.append = append  # type: ignore[method-assign]


def gradients(engine: Any) -> list[Tensor]:
    """Return every gradient that is held, wherever."""
    found: list[Any] = [parameter.grad for parameter in engine.module.parameters()]
    found += getattr(engine.optimizer, "fp32_groups_gradients_flat", [])
    found += [] if engine.view.buffers is None else [group.flat for group in engine.view.buffers.groups]
    for pieces in getattr(engine.optimizer, "averaged_gradients", {}).values():
        found += pieces or []
    return [tensor for tensor in found if tensor is not None]


def measure(rank: int, case: Case, specs: list[LayerSpec] | None = None) -> dict[str, int]:
    """Train two steps, and return what is held in the second."""
    engine = build_engine(case, specs=specs)
    engine.train_batch(micro_batches(0, case, engine.mpu.data_parallel_rank))
    probe = Probe(engine)
    with torch.autograd.graph.saved_tensors_hooks(probe.keep, lambda tensor: tensor), noting_deferred(probe):
        engine.train_batch(micro_batches(1, case, engine.mpu.data_parallel_rank))
    weights = list(engine.module.parameters())
    torch_optimizer = engine.view.torch_optimizer
    masters = [parameter for group in torch_optimizer.param_groups for parameter in group["params"]]
    states = [value for state in torch_optimizer.state.values() for value in state.values()]
    return {
        "pipe_rank": engine.mpu.pipe_rank,
        "weights": num_bytes(weights),
        "masters": num_bytes(weights + masters) - num_bytes(weights),
        "optimizer_states": num_bytes(state for state in states if isinstance(state, Tensor)),
        # One gradient at a time is yet to be added.
        "gradients": probe.gradients + probe.largest_gradient,
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
    Case(pp=4, schedule="zb-v", checkpointing=True),
]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_running_processes_hold_what_was_predicted(gloo: GlooWorkers, case: Case) -> None:
    expected = predicted(case)
    for found in gloo.run(case.world_size, measure, case):
        parts, recomputation = expected[found["pipe_rank"]]
        for name in STANDING:
            assert found[name] == getattr(parts, name), name
        assert found["activations"] == pytest.approx(parts.activations - recomputation, rel=0.02)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, offload="nvme", precision="bf16"),
        Case(dp=2, zero=3, offload="nvme", precision="bf16"),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                Case(dp=2, zero=2, offload="nvme", micro_batch_size=4, optimizer="sgd"),
                Case(dp=2, zero=3, offload="nvme"),
            )
        ),
    ],
    ids=str,
)
def test_files_take_what_was_predicted(gloo: GlooWorkers, case: Case) -> None:
    expected = predicted(case)
    for pipe_rank, size, on_device in gloo.run(2, measure_files, case):
        parts, _ = expected[pipe_rank]
        assert (size, on_device) == (parts.files, parts.weights)


def measure_files(rank: int, case: Case) -> tuple[int, int, int]:
    """Train a step, and return the size of the files and of the weights that are not in them."""
    engine = build_engine(case)
    engine.train_batch(micro_batches(0, case, engine.mpu.data_parallel_rank))
    files = engine.view.state_like.__self__
    weights = [getattr(each, "ds_tensor", each) for each in engine.module.parameters()]
    return engine.mpu.pipe_rank, files.num_bytes, num_bytes(each for each in weights if each not in files)


@pytest.mark.distributed
@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("fp32", 1), ("bf16", 1)])
def test_a_rank_without_parameters_holds_an_idle_one(gloo: GlooWorkers, precision: Precision, zero: int) -> None:
    specs = [*model_specs(Case(tied=False))[:-1], LayerSpec(nn.GELU), model_specs(Case(tied=False))[-1]]
    case = Case(pp=3, precision=precision, zero=zero, boundaries=(0, 9, 10, 11))
    stages = stage_contents([LINEAR] * len(specs), parameter_shapes(specs), [0, 9, 10, 11])
    schedule = plan_1f1b(num_stages=3, num_micro_batches=8)
    for found in gloo.run(3, measure, case, specs):
        pipe_rank = found["pipe_rank"]
        parts = peak_memory(stages, schedule, loss=None, precision=precision, zero=zero, dp=1)[pipe_rank]
        assert {name: found[name] for name in STANDING} == {name: getattr(parts, name) for name in STANDING}


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, those apart that were there before."""

    def __init__(self, standing: Iterable[Tensor]) -> None:
        super().__init__()
        self._standing = {StorageWeakRef(tensor.untyped_storage()) for tensor in standing}
        self._known = {weak.cdata for weak in self._standing}
        self._alive: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                weak = StorageWeakRef(tensor.untyped_storage())
                if weak.cdata not in self._known:
                    self._alive.append((weak, tensor.untyped_storage().nbytes()))
                    self._known.add(weak.cdata)
        ended = {weak.cdata for weak, _ in self._alive if weak.expired()}
        self._alive = [(weak, size) for weak, size in self._alive if weak.cdata not in ended]
        self._known -= ended
        self.peak = max(self.peak, sum(size for _, size in self._alive))
        return result


def wide_specs() -> list[LayerSpec]:
    """Return layers of large weights and small activations."""
    return [
        LayerSpec(nn.Embedding, VOCAB, 512),
        *(LayerSpec(nn.Linear, 512, 512) for _ in range(4)),
        LayerSpec(nn.Linear, 512, VOCAB),
    ]


def peak_of_a_step(rank: int, case: Case) -> tuple[int, int]:
    """Return the bytes that stay from step to step, and those that a step allocates beside them."""
    engine = build_engine(case, specs=wide_specs())
    torch_optimizer = engine.view.torch_optimizer
    for group in torch_optimizer.param_groups:
        group["fused"] = True
    engine.train_batch(micro_batches(0, case, rank))
    weights = list(engine.module.parameters())
    masters = [parameter for group in torch_optimizer.param_groups for parameter in group["params"]]
    states = [value for state in torch_optimizer.state.values() for value in state.values()]
    standing = [*weights, *masters, *states, *(group.flat for group in engine.view.buffers.groups)]
    data = list(micro_batches(1, case, rank))
    with Allocations(standing) as allocations:
        engine.train_batch(iter(data))
    return num_bytes(standing), allocations.peak


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("precision", "zero"), [("bf16", 1), pytest.param("fp16", 1, marks=pytest.mark.slow), ("fp32", 1), ("fp32", 0)]
)
def test_a_step_allocates_no_copy_of_the_gradients(gloo: GlooWorkers, precision: Precision, zero: int) -> None:
    case = Case(dp=2, precision=precision, zero=zero, clip=1.0)
    ((parts, _),) = predicted(case, wide_specs())
    for standing, allocated in gloo.run(2, peak_of_a_step, case):
        assert standing + allocated == pytest.approx(parts.total, rel=0.02)
        # The gradients of one replica's share would be four times the largest weight in fp32, or more.
        assert allocated < 2 * 4 * 512 * 512


LINEAR = LayerCosts(
    20, 40, 40, 40, input_bytes=16, output_bytes=20, saved_bytes=0, keeps_input=True, keeps_output=False
)
WIDE = replace(LINEAR, input_bytes=20, output_bytes=40, saved_bytes=1000, keeps_output=True)
LOSS = replace(LINEAR, input_bytes=40, output_bytes=4, saved_bytes=80, keeps_input=False)


def two_stages(pipe_rank: int = 0, **options: Any) -> MemoryParts:
    """Return what a rank of two holds: 21 elements that decay and 7 that do not on the first stage, 9 on the second."""
    setting = ActivationCheckpointing() if options.pop("checkpointing", False) else None
    first, last = recompute_layers([LINEAR, WIDE], setting, ["a", "b"])
    stages = [
        StageContents([first], {"a.weight": (3, 7), "a.bias": (7,)}),
        StageContents([last], {"b.weight": (3, 3)}),
    ]
    schedule = options.pop("schedule", plan_1f1b(num_stages=2, num_micro_batches=4))
    settings = {"precision": "fp32", "zero": 1, "dp": 1, "loss": LOSS, **options}
    return peak_memory(stages, schedule, **settings)[pipe_rank]


def test_groups_are_filled_up_to_the_alignment_of_all_replicas() -> None:
    # 21 and 7 elements; two for each replica: 22 + 8, 24 + 8 and 24 + 12.
    assert [two_stages(dp=dp).weights for dp in (1, 2, 3, 6)] == [4 * 30, 4 * 32, 4 * 36, 4 * 36]
    assert [two_stages(dp=dp).masters for dp in (1, 2, 3, 6)] == [4 * 30, 4 * 16, 4 * 12, 4 * 6]
    # Two moments, and a step count for each group.
    assert two_stages(dp=2).optimizer_states == 2 * 4 * 16 + 4 * 2
    assert two_stages(dp=2, zero=0).optimizer_states == 2 * 4 * 28 + 4 * 2
    assert two_stages(dp=2, zero=0).masters == 0


def test_moments_follow_from_the_optimizer() -> None:
    assert two_stages(optimizer_states=OptimizerStates(0, 0)).optimizer_states == 0
    assert two_stages(optimizer_states=OptimizerStates(1, 0)).optimizer_states == 4 * 30
    assert two_stages(optimizer_states=ADAM_STATES) == two_stages()


def test_16_bits_hold_masters_and_gradients_in_fp32() -> None:
    bf16, fp16 = (two_stages(precision=precision, zero=0) for precision in ("bf16", "fp16"))
    assert bf16.weights == fp16.weights == 2 * 30
    assert bf16.masters == fp16.masters == 4 * 30
    # The flat buffer, and the largest gradient before it is added.
    assert bf16.gradients == fp16.gradients == 4 * 30 + 2 * 21


@pytest.mark.parametrize(("zero", "dp"), [(0, 1), (1, 2), (3, 2)])
def test_frozen_parameters_take_their_weights_and_nothing_else(zero: int, dp: int) -> None:
    specs = freeze(model_specs(Case()), ["embed.*", "blocks.0.*"])
    trained, frozen = trained_and_frozen_shapes(specs)
    schedule = plan_1f1b(num_stages=2, num_micro_batches=8)
    layers, boundaries = [LINEAR] * len(specs), [0, 5, len(specs)]

    def states(frozen: list[dict[str, tuple[int, ...]]]) -> list[dict[str, int]]:
        stages = stage_contents(layers, trained, boundaries, frozen=frozen)
        held = peak_memory(stages, schedule, loss=None, precision="bf16", zero=zero, dp=dp)
        return [{name: getattr(parts, name) for name in STANDING} for parts in held]

    elements = [count_elements(*frozen[:5]), count_elements(*frozen[5:])]
    assert elements == [count_elements(*parameter_shapes(model_specs(Case()))[:4]) - 16 * 32, 67 * 32]
    for with_frozen, without, number in zip(states(frozen), states([]), elements, strict=True):
        assert with_frozen == {**without, "weights": without["weights"] + 2 * number // (dp if zero == 3 else 1)}


def test_parameters_that_two_stages_of_a_rank_share_are_there_once() -> None:
    layers, weight = [LINEAR, WIDE, WIDE, WIDE], {"embedding.weight": (5, 4)}
    stages = stage_contents(layers, [weight, {}, {}, weight], [0, 1, 2, 3, 4])
    schedule = plan_schedule("zb-v", pp=2, num_micro_batches=4)
    parts = peak_memory(stages, schedule, loss=LOSS, precision="fp32", zero=0, dp=1)[0]
    assert (parts.weights, parts.gradients) == (80, 2 * 80)


def test_activations_are_those_of_the_micro_batches_in_flight() -> None:
    assert two_stages().activations == 2 * (16 + 20)
    assert two_stages(1, loss=None).activations == 20 + 1000 + 40
    # Recomputed is one layer at a time, its output too where it is kept.
    assert two_stages(1, loss=None, checkpointing=True).activations == 20 + 40 + 1000 + 40


def test_the_loss_keeps_what_its_backward_needs() -> None:
    # The logits are kept because the last layer keeps its output, which checkpointing does not let it.
    assert two_stages(1).activations == 20 + 1000 + 40 + 80 + 4
    assert two_stages(1, checkpointing=True).activations == 20 + 80 + 4 + 1000 + 40
    assert (
        two_stages(1, checkpointing=True, loss=replace(LOSS, keeps_input=True)).activations == 20 + 40 + 80 + 4 + 1040
    )


def test_the_input_of_a_layer_that_keeps_nothing_is_not_kept_by_checkpointing() -> None:
    layers = [WIDE, replace(LINEAR, input_bytes=40, keeps_input=False), WIDE]
    layers = recompute_layers(layers, ActivationCheckpointing(), ["a", "b", "c"])
    stages = [StageContents(layers, {})]
    options: dict[str, Any] = {"loss": None, "precision": "fp32", "zero": 0, "dp": 1}
    parts = peak_memory(stages, plan_1f1b(num_stages=1, num_micro_batches=4), **options)[0]
    assert parts.activations == 20 + 20 + 40 + recomputation_bytes(layers)


def test_what_is_passed_between_stages_of_a_rank_is_there_once() -> None:
    schedule = plan_schedule("zb-v", pp=2, num_micro_batches=1)
    same = replace(LINEAR, output_bytes=16)
    stages = [StageContents([same], {}) for _ in range(4)]
    held = peak_memory(stages, schedule, loss=None, precision="fp32", zero=0, dp=1)
    assert [parts.activations for parts in held] == [2 * 32, 2 * 32 - 16]


def test_split_backwards_keep_what_was_recomputed_until_the_weight_gradient() -> None:
    whole = two_stages(1, checkpointing=True).activations
    split = two_stages(1, checkpointing=True, schedule=plan_zb_h1(num_stages=2, num_micro_batches=4)).activations
    assert split >= whole + 1000


def test_the_last_stage_holds_the_gradients_of_its_logits_for_a_moment() -> None:
    assert (two_stages(0).logits, two_stages(1).logits, two_stages(1, loss=None).logits) == (0, 2 * 80, 0)


def test_messages_are_received_ahead_and_gradients_are_passed_on() -> None:
    # The message between the stages has 20 bytes. Rank 0 posts two gradients while one more is in use.
    assert two_stages(0).communication == 2 * 20 + 20
    assert two_stages(1).communication == 2 * 20 + 20


def test_gradients_are_there_once_and_the_largest_twice() -> None:
    # Without ZeRO they lie in flat buffers only where replicas reduce them, and nothing is filled up.
    assert [two_stages(zero=0, dp=dp).gradients for dp in (1, 2)] == 2 * [4 * 28 + 4 * 21]
    assert two_stages(zero=1, dp=2).gradients == 4 * 32 + 4 * 21
    parts = two_stages(dp=2)
    standing = parts.weights + parts.gradients + parts.optimizer_states + parts.masters
    assert parts.total == standing + parts.activations + parts.logits + parts.communication


def test_zero_2_and_3_hold_shares_of_gradients_and_weights() -> None:
    one, two, three = (two_stages(dp=2, zero=zero) for zero in (1, 2, 3))
    assert one.gradients > two.gradients == three.gradients == 4 * 16
    assert one.weights == two.weights == 2 * three.weights


def test_stages_that_do_not_fit_the_schedule_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"2 stages do not fit the schedule 1f1b, which has 3; divide the layers"):
        two_stages(schedule=plan_1f1b(num_stages=3, num_micro_batches=4))
