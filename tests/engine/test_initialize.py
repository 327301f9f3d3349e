"""DeepSpeed pipeline scripts on pipekit: what they pass, what they get back, and what goes wrong for them elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from engine_jobs import GLOBAL_BATCH, SEQUENCE, VOCAB, micro_batches
from engine_jobs import Case as EngineCase
from gloo_workers import GlooWorkers, RankError
from pipekit import PipekitError
from pipekit.inference.export import export_checkpoint
from pipekit.inference.raw_export import export_raw
from pipekit.layers.specs import LayerSpec

pytestmark = pytest.mark.distributed

WIDTH = 16
CASE = EngineCase()


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Embedding(nn.Embedding):
    pass


def scores(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return x @ embedding.weight.t()


def looked_up(embedding: nn.Embedding, token_ids: Tensor) -> Tensor:
    return F.embedding(token_ids, embedding.weight)


def deepspeed_layers() -> list[Any]:
    """Layers as a DeepSpeed script has them: its own specs, tied ones, modules, and functions."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    return [
        TiedLayerSpec("embed", Embedding, VOCAB, WIDTH, forward_fn=looked_up),
        LayerSpec(nn.Linear, WIDTH, WIDTH),
        torch.tanh,
        LayerSpec(nn.LayerNorm, WIDTH),
        lambda x: x * 2.0,
        TiedLayerSpec("embed", Embedding, VOCAB, WIDTH, forward_fn=scores),
    ]


def config(**changes: Any) -> dict[str, Any]:
    return {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        **changes,
    }


def build(num_stages: int, layers: list[Any] | None = None, **options: Any) -> Any:
    import pipekit

    settings = options.pop("config", config())
    keys = ("optimizer", "model_parameters", "training_data", "lr_scheduler", "collate_fn", "model_config", "mpu")
    given = {key: options.pop(key) for key in keys if key in options}
    module = pipekit.PipelineModule(
        layers=deepspeed_layers() if layers is None else layers, num_stages=num_stages, loss_fn=loss_fn, **options
    )
    return pipekit.initialize(model=module, config=settings, **given)


def batches(step: int, engine: Any) -> Any:
    case = EngineCase(dp=engine.mpu.layout.dp)
    return micro_batches(step, case, engine.mpu.data_parallel_rank)


def train_script(rank: int, num_stages: int, options: dict[str, Any]) -> list[float]:
    engine, optimizer, loader, scheduler = build(num_stages, **options)
    assert optimizer is engine.optimizer
    assert loader is None
    assert scheduler is None
    return [float(engine.train_batch(data_iter=batches(step, engine))) for step in range(4)]


def train_in_place(rank: int, interval: int) -> list[float]:
    layers = [*deepspeed_layers()[:1], LayerSpec(nn.ReLU, inplace=True), *deepspeed_layers()[1:]]
    engine, *_ = build(1, layers, config=config(pipeline={"activation_checkpoint_interval": interval}))
    return [float(engine.train_batch(data_iter=batches(step, engine))) for step in range(2)]


def test_layers_that_change_their_input_in_place_are_recomputed_from_what_it_was(gloo: GlooWorkers) -> None:
    (plain,), (recomputed,) = (gloo.run(1, train_in_place, interval) for interval in (0, 1))
    assert recomputed == plain


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "zb-h1"},
        {"schedule": "zb-v", "partition_method": "uniform"},
        {
            "config": config(
                pipeline={"activation_checkpoint_interval": 2}, activation_checkpointing={"cpu_checkpointing": True}
            )
        },
        {"config": config(zero_optimization={"stage": 1}, gradient_clipping=1.0)},
        {"partition_method": "type:Linear|Embedding"},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_a_deepspeed_script_trains_as_it_does_alone(gloo: GlooWorkers, options: dict[str, Any]) -> None:
    alone = gloo.run(1, train_script, 1, {"config": options.get("config", config())})[0]
    assert alone[-1] < alone[0]
    for losses in gloo.run(2, train_script, 2, options):
        assert losses == pytest.approx(alone, rel=1e-5)


REFUSED = {
    "typo": ({"config": config(zero_optimisation={"stage": 1})}, "zero_optimisation: unknown key; did you mean"),
    "zero 2": ({"config": config(zero_optimization={"stage": 2})}, "stage=2 does not go with the 2 stages of this"),
    "zero 3": (
        {"num_stages": 1, "schedule": "gpipe", "config": config(zero_optimization={"stage": 3})},
        "schedule=gpipe does not go with zero_optimization.stage=3",
    ),
    "no optimizer": ({"config": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}}, "no optimizer: give"),
    "no config": ({"config": None}, "no configuration: give config="),
    "no file": ({"config": "no/such.json"}, "no/such.json: cannot be read as a DeepSpeed configuration"),
    "stages": ({"num_stages": 3}, "num_stages=3 does not divide the 2 processes; try 1 or 2"),
    "no stages": ({"num_stages": None}, "PipelineModule needs num_stages"),
    "layer": ({"layers": [nn.Linear]}, "layer 0 is the class Linear; a layer is a LayerSpec, a module, or a function"),
    "seeds": ({"seed_layers": False}, "PipelineModule always seeds its layers"),
    "checkpointing": ({"activation_checkpoint_func": print}, "checkpoints activations with torch.utils"),
    "model": (
        {"model_config": {"model": {"preset": "tiny", "vocab_size": VOCAB}}},
        "describes a model with embed.weight (67, 128), and in the PipelineModule it is (67, 16)",
    ),
    "inputs of no checkpoint": (
        {"config": config(activation_checkpointing={"cpu_checkpointing": True})},
        "activation_checkpointing.cpu_checkpointing=true is about the inputs of layers that are recomputed, and none",
    ),
    "stages in both": (
        {"config": config(pipeline={"stages": 1})},
        "pipeline.stages=1 and PipelineModule(num_stages)=2 do not agree",
    ),
    "no effect": (
        {"config": config(prescale_gradients=True)},
        "config: prescale_gradients=true: has no effect here, since the gradients of replicas are",
    ),
    "another mpu": ({"mpu": object()}, "mpu: a PipelineModule has its own; give PipelineModule(mpu=...)"),
    "micro-batches": (
        {"schedule": "interleaved-1f1b", "partition_method": "uniform", "config": config(train_batch_size=3)},
        "needs a multiple of parallel.pp=2 micro-batches, and a step has 3",
    ),
}  # fmt: skip


def refused(rank: int, name: str) -> str:
    options = {"num_stages": 2, **REFUSED[name][0]}
    from pipekit import PipekitError

    with pytest.raises(PipekitError) as caught:
        build(options.pop("num_stages"), **options)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_on_every_rank(gloo: GlooWorkers, name: str) -> None:
    for message in gloo.run(2, refused, name):
        assert REFUSED[name][1] in message


# What goes wrong for users of DeepSpeed's own pipeline engine, one test each.


def train_16_bits_tied(rank: int) -> tuple[Tensor, list[float]]:
    settings = config(bf16={"enabled": True}, zero_optimization={"stage": 1}, data_types={"grad_accum_dtype": "fp32"})
    engine, *_ = build(2, config=settings)
    losses = [float(engine.train_batch(batches(step, engine))) for step in range(6)]
    return engine.module.tied_modules["embed"].weight.detach().clone(), losses


def test_tied_weights_do_not_drift_apart_under_fp32_accumulation(gloo: GlooWorkers) -> None:
    (first, losses), (last, _) = gloo.run(2, train_16_bits_tied)
    assert torch.equal(first, last)
    assert losses[-1] < losses[0]


def save_and_load(rank: int, folder: str) -> tuple[list[str], bool, dict[str, Any]]:
    from safetensors import safe_open

    engine, *_ = build(2)
    for step in range(2):
        engine.train_batch(batches(step, engine))
    engine.save_checkpoint(folder, tag="mine", client_state={"note": "so far", "epoch": 3})
    weights = [parameter.detach().clone() for parameter in engine.module.parameters()]
    engine.train_batch(batches(2, engine))
    engine.save_checkpoint(folder, tag="unnamed", save_latest=False)
    for call in (
        lambda: engine.save_checkpoint(folder, exclude_frozen_parameters=True),
        lambda: engine.load_checkpoint(folder, load_module_strict=False),
    ):
        with pytest.raises(PipekitError, match="leave"):
            call()
    path, client_state = engine.load_checkpoint(folder)
    same = all(map(torch.equal, weights, (parameter.detach() for parameter in engine.module.parameters())))
    names: list[str] = []
    for file in Path(path).glob("weights-*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            names += stored.keys()
    assert yaml.safe_load((Path(path) / "config.yaml").read_text())["deepspeed"] == engine.config
    return sorted(names), same and engine.global_steps == 2, client_state


def test_tied_layers_that_have_forward_functions_only_are_saved(gloo: GlooWorkers, tmp_path: Path) -> None:
    for names, same, client_state in gloo.run(2, save_and_load, str(tmp_path)):
        assert "embed.weight" in names
        assert len(names) == 5
        assert same
        assert client_state == {"note": "so far", "epoch": 3}
    assert export_raw(tmp_path / "mine", tmp_path / "raw").num_tensors == 5
    config = yaml.safe_load((tmp_path / "raw/config.yaml").read_text())
    assert config["layers"][0] == {"name": "embed", "type": "Embedding"}
    assert load_file(tmp_path / "raw/model.safetensors").keys() == set(names)
    with pytest.raises(PipekitError, match=r"does not tell its model, .*--config.*--raw"):
        export_checkpoint(tmp_path / "mine", tmp_path / "out")


def train_on_other_batches(rank: int) -> str:
    from pipekit.errors import DataError

    engine, *_ = build(2)
    with pytest.raises(DataError) as caught:
        engine.train_batch(batches(rank, engine))
    return str(caught.value)


def test_stages_that_read_other_batches_are_found_out(gloo: GlooWorkers) -> None:
    for message in gloo.run(2, train_on_other_batches):
        assert "the first and the last stage read different batches" in message


class Numbered(torch.utils.data.Dataset):
    """Sample `i` is made of the token `i`, so that an epoch's order can be read off."""

    seen: list[int]

    def __init__(self) -> None:
        self.seen = []

    def __len__(self) -> int:
        return 3 * GLOBAL_BATCH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        tokens = torch.full((SEQUENCE,), index % VOCAB)
        return tokens, tokens


def train_on_a_dataset(rank: int, folder: str) -> tuple[list[int], list[int]]:
    data = Numbered()
    engine, _, loader, _ = build(2, training_data=data)
    assert len(loader) == 3 * GLOBAL_BATCH
    engine.train_batch()
    engine.save_checkpoint(folder)
    for _ in range(5):
        engine.train_batch()
    first = list(data.seen)
    again = Numbered()
    engine, *_ = build(2, training_data=again)
    engine.load_checkpoint(folder)
    for _ in range(3):
        engine.train_batch()
    return first, again.seen


def test_training_data_come_in_their_order_and_their_position_is_saved(gloo: GlooWorkers, tmp_path: Path) -> None:
    size = 3 * GLOBAL_BATCH
    for first, again in gloo.run(2, train_on_a_dataset, str(tmp_path)):
        # What was read ahead of the last step comes behind.
        assert first[: 2 * size] == [*range(size), *range(size)]
        assert again[: 2 * GLOBAL_BATCH] == list(range(GLOBAL_BATCH, 3 * GLOBAL_BATCH))


def initial_weights(rank: int, num_stages: int, method: str) -> dict[str, Tensor]:
    engine, *_ = build(num_stages, partition_method=method)
    return {name: parameter.detach().clone() for name, parameter, _ in engine.module.named_logical_parameters()}


def test_initial_weights_depend_neither_on_the_stages_nor_on_the_partition(gloo: GlooWorkers) -> None:
    alone = gloo.run(1, initial_weights, 1, "uniform")[0]
    assert not torch.equal(alone["layers.1.weight"], alone["layers.1.weight"].t())
    for method in ("uniform", "parameters"):
        for weights in gloo.run(2, initial_weights, 2, method):
            assert all(torch.equal(tensor, alone[name]) for name, tensor in weights.items())


def bf16_loss(rank: int) -> tuple[float, float]:
    engine, *_ = build(
        1, config=config(train_batch_size=256, bf16={"enabled": True}), layers=[nn.Embedding(VOCAB, VOCAB)]
    )
    weight = next(engine.module.parameters()).detach().float()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (256, 1, SEQUENCE), generator=generator)
    exact = torch.stack([F.cross_entropy(weight[x].bfloat16().flatten(0, 1), x.flatten()).float() for x in tokens])
    return float(engine.train_batch(iter([(x, x) for x in tokens]))), float(exact.mean())


def test_the_loss_of_many_micro_batches_adds_up_in_fp32(gloo: GlooWorkers) -> None:
    found, exact = gloo.run(1, bf16_loss)[0]
    assert found == pytest.approx(exact, rel=1e-6)


def watch_a_run(rank: int, folder: str) -> str:
    handler = logging.FileHandler(Path(folder) / f"{rank}.log")
    logger = logging.getLogger("pipekit.engine.diagnostics")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    settings = config(wall_clock_breakdown=True, steps_per_print=1, flops_profiler={"enabled": True, "profile_step": 2})
    engine, *_ = build(2, config=settings)
    for step in range(2):
        engine.train_batch(batches(step, engine))
    logger.removeHandler(handler)
    handler.close()
    return (Path(folder) / f"{rank}.log").read_text()


def test_wall_clock_breakdown_and_the_flops_profiler_speak_up(gloo: GlooWorkers, tmp_path: Path) -> None:
    for rank, text in enumerate(gloo.run(2, watch_a_run, str(tmp_path))):
        assert f"rank {rank}, step 1: forward " in text
        assert "waiting and all else" in text
        flops = float(text.split("step 2: ")[1].split(" floating")[0])
        assert flops > 0


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embedding(token_ids)
        return x, x.square(), token_ids % 2


class FromTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, square, mask = inputs
        return self.linear(x + square * mask.unsqueeze(-1))


def test_checkpointing_takes_integers_and_two_float_outputs(gloo: GlooWorkers) -> None:
    plain = gloo.run(2, train_two_outputs, 0)
    assert gloo.run(2, train_two_outputs, 1) == plain


def train_two_outputs(rank: int, interval: int) -> list[float]:
    engine, *_ = build(2, layers=[LayerSpec(TwoOutputs), LayerSpec(FromTwo)], partition_method="uniform",
                       activation_checkpoint_interval=interval)  # fmt: skip
    return [float(engine.train_batch(batches(0, engine))) for _ in range(2)]


def train_without_parameters(rank: int) -> list[float]:
    import pipekit

    layers = [nn.Embedding(VOCAB, VOCAB), torch.tanh]
    module = pipekit.PipelineModule(layers, num_stages=2, loss_fn=loss_fn, partition_method="uniform")
    # The stage without parameters has something to build an optimizer of.
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    settings = {"train_batch_size": GLOBAL_BATCH, "train_micro_batch_size_per_gpu": 1}
    engine, *_ = pipekit.initialize(model=module, optimizer=optimizer, config=settings)
    return [float(engine.train_batch(batches(0, engine))) for _ in range(2)]


def test_a_stage_without_parameters_has_an_optimizer(gloo: GlooWorkers) -> None:
    losses = gloo.run(2, train_without_parameters)[0]
    assert losses[1] < losses[0]


def end_of_data(rank: int, ending: int) -> str:
    from pipekit.errors import DataError

    engine, *_ = build(3, layers=[nn.Embedding(VOCAB, VOCAB), nn.Linear(VOCAB, VOCAB), nn.Linear(VOCAB, VOCAB)])
    data = list(batches(0, engine))
    with pytest.raises(DataError) as caught:
        engine.train_batch(iter(data[:5] if rank == ending else data))
    return str(caught.value)


@pytest.mark.parametrize(("ending", "stage"), [(0, "first"), (2, "last")])
def test_data_that_end_stop_every_stage(gloo: GlooWorkers, ending: int, stage: str) -> None:
    for message in gloo.run(3, end_of_data, ending):
        assert message.startswith(f"the data of the {stage} stage ended at micro-batch 5 of {GLOBAL_BATCH}")


def train_changing_shapes(rank: int, num_stages: int, schedule: str) -> list[float]:
    engine, *_ = build(num_stages, schedule=schedule, partition_method="uniform")
    losses = []
    for step in range(4):
        # A new sequence length in every step, and a short micro-batch in the middle of each.
        data = [(x[:, : SEQUENCE - step], y[:, : SEQUENCE - step]) for x, y in batches(step, engine)]
        data[3] = (data[3][0][:, :5], data[3][1][:, :5])
        losses.append(float(engine.train_batch(iter(data))))
    return losses


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_shapes_may_change_from_micro_batch_to_micro_batch(gloo: GlooWorkers, schedule: str) -> None:
    alone = gloo.run(1, train_changing_shapes, 1, "1f1b")[0]
    for losses in gloo.run(2, train_changing_shapes, 2, schedule):
        assert losses == pytest.approx(alone, rel=1e-5)


def evaluate(rank: int, num_stages: int) -> dict[str, Any]:
    engine, *_ = build(num_stages)
    engine.train_batch(batches(0, engine))
    loss, logits = engine.eval_batch(batches(1, engine), return_logits=True)
    each = engine.eval_batch(batches(1, engine), reduce_output=None)
    outputs = engine.eval_batch(batches(1, engine), compute_loss=False, reduce_output=None)
    mean = engine.eval_batch(batches(1, engine), compute_loss=False)
    quiet = engine.eval_batch(batches(1, engine), bcast_loss=False)
    short = engine.eval_batch(batches(1, engine), num_micro_batches=2)
    engine.train_batch(batches(2, engine))
    return {
        "loss": float(loss), "logits": logits, "each": [float(value) for value in each], "outputs": outputs,
        "mean": mean, "quiet": quiet, "short": float(short),
    }  # fmt: skip


def test_eval_batch_does_all_that_it_is_asked(gloo: GlooWorkers) -> None:
    alone = gloo.run(1, evaluate, 1)[0]
    first, last = gloo.run(2, evaluate, 2)
    assert first["loss"] == last["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert first["each"] == last["each"] == pytest.approx(alone["each"], rel=1e-5)
    assert alone["loss"] == pytest.approx(sum(alone["each"]) / GLOBAL_BATCH, rel=1e-5)
    assert first["short"] == pytest.approx(sum(alone["each"][:2]) / 2, rel=1e-5)
    assert [first[key] for key in ("logits", "outputs", "mean", "quiet")] == [None] * 4
    assert last["logits"].shape == (GLOBAL_BATCH, SEQUENCE, VOCAB)
    torch.testing.assert_close(last["logits"], alone["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(last["outputs"]), last["logits"])
    torch.testing.assert_close(last["mean"], torch.stack(last["outputs"]).mean(0))
    assert float(last["quiet"]) == pytest.approx(alone["loss"], rel=1e-5)


class Nested(nn.Module):
    """Returns a dict with a list, None, something not contiguous, and a float that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        x = self.embedding(inputs["tokens"])
        return {"x": [x.transpose(0, 1), x * 3.0], "nothing": None, "mask": inputs["mask"]}


class FromNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        assert inputs["nothing"] is None
        assert inputs["mask"].dtype == torch.bool
        return self.linear(inputs["x"][0].transpose(0, 1) * inputs["mask"].unsqueeze(-1))


def train_nested(rank: int, num_stages: int) -> list[float]:
    engine, *_ = build(num_stages, layers=[LayerSpec(Nested), LayerSpec(FromNested)], partition_method="uniform")
    engine.set_batch_fn(lambda batch: ({"tokens": batch["ids"], "mask": batch["ids"] % 3 > 0}, batch["targets"]))
    return [
        float(engine.train_batch(iter([{"ids": x, "targets": y} for x, y in batches(step, engine)])))
        for step in range(2)
    ]


def test_dicts_lists_none_and_unused_outputs_pass(gloo: GlooWorkers) -> None:
    alone = gloo.run(1, train_nested, 1)[0]
    for losses in gloo.run(2, train_nested, 2):
        assert losses == pytest.approx(alone, rel=1e-5)


def train_on_odd_batches(rank: int) -> None:
    engine, *_ = build(1)
    engine.train_batch(iter([{"ids": x, "targets": y} for x, y in batches(0, engine)]))


def test_a_batch_that_is_no_pair_says_what_to_do(gloo: GlooWorkers) -> None:
    with pytest.raises(RankError, match=r"the iterator gave a dict of ids, targets; .*engine\.set_batch_fn"):
        gloo.run(1, train_on_odd_batches)
