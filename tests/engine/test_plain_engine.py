"""Plain modules under ZeRO 0 to 3, against one process that uses nothing but torch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gloo_workers import GlooWorkers
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.errors import PipekitError
from plain_modules import (
    GLOBAL_BATCH,
    STEPS,
    batch,
    build,
    build_tagger,
    config,
    groups_of,
    narrow,
    train,
    weights_of,
)

pytestmark = pytest.mark.distributed


def reference() -> tuple[list[float], dict[str, Tensor]]:
    model = build_tagger()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = model(*batch(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_all(rank: int) -> list[tuple[str, list[float], dict[str, Tensor]]]:
    results = []
    for zero in range(4):
        for accumulation in (1, 3):
            engine, optimizer, loader, scheduler = build(zero, accumulation)
            assert optimizer is engine.optimizer
            assert loader is scheduler is None
            losses = train(engine)
            assert engine.global_steps == STEPS
            assert engine.global_samples == STEPS * GLOBAL_BATCH
            engine.check_replicas()
            results.append((f"ZeRO {zero}, accumulation {accumulation}", losses, weights_of(engine)))
            engine.destroy()
    return results


@pytest.mark.parametrize("dp", [1, 2])
def test_it_trains_as_torch_does_alone(gloo: GlooWorkers, dp: int) -> None:
    expected, weights = reference()
    assert expected[-1] < 0.85 * expected[0]
    for results in gloo.run(dp, train_all):
        assert len(results) == 8
        for name, losses, found in results:
            assert losses == pytest.approx(expected, rel=1e-6, abs=1e-6), name
            assert found.keys() == weights.keys()
            for key, tensor in found.items():
                torch.testing.assert_close(tensor, weights[key], rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")


def scheduler(optimizer: Any) -> Any:
    # Multiplies what the last step had, so that a run goes on as before only if that is stored, too.
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4, 7], gamma=0.5)


def save_half(rank: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for zero, precision in ((2, None), (3, "bf16"), (1, "fp16")):
        allow_fp16()
        # From its default scale of 2**16, fp16 would begin with steps that overflow.
        scale = {"initial_scale_power": 8} if precision == "fp16" else {}
        changes = {} if precision is None else {precision: {"enabled": True, **scale}}
        engine, *_ = build(zero, 3, changes=changes, lr_scheduler=scheduler)
        train(engine, 0, 5)
        engine.save_checkpoint(f"{folder}/{precision}", client_state={"epoch": 3, "rank": rank})
        before = weights_of(engine)
        losses = train(engine, 5)
        after = weights_of(engine)
        lr = engine.get_lr()
        # Another model of the same kind goes on in the same way, bit for bit.
        again, *_ = build(zero, 3, seed=2, changes=changes, lr_scheduler=scheduler)
        path, client_state = again.load_checkpoint(f"{folder}/{precision}")
        assert path == f"{folder}/{precision}/step-00000005"
        assert client_state == {"epoch": 3, "rank": 0}
        assert int(again.module.counted) == 5 * GLOBAL_BATCH // engine.dp_world_size
        assert train(again, 5) == losses
        assert again.get_lr() == lr == [1e-2 / 8] * 2
        assert all(torch.equal(tensor, after[name]) for name, tensor in weights_of(again).items())
        results[str(precision)] = {"losses": losses, "before": before}
    return results


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on processors without fp16 instructions; torch computes it all the same."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def go_on_alone(rank: int, folder: str) -> list[tuple[list[float], dict[str, Tensor], dict[str, Tensor]]]:
    results = []
    for zero in (0, 3):
        engine, *_ = build(zero, 1, seed=3, lr_scheduler=scheduler)
        engine.load_checkpoint(folder)
        named = list(engine.logical.named_logical_parameters())
        states = {
            f"{state}.{name}": engine.view.full_state(parameter, state).clone()
            for name, parameter, _ in named
            for state in ("exp_avg", "exp_avg_sq")
            if engine.view.updates(parameter)
        }
        assert engine.view.step_count() == engine.global_steps == 5
        results.append((train(engine, 5), weights_of(engine), states))
    return results


def test_a_run_goes_on_under_another_dp_and_zero_stage(gloo: GlooWorkers, tmp_path: Path) -> None:
    (saved, _) = gloo.run(2, save_half, str(tmp_path))
    expected = saved["None"]["losses"]
    reader = CheckpointReader(tmp_path / "None/step-00000005")
    # The shared weights are there once, and what is not persistent is not.
    names = {"embedding.weight", "head.bias", "counted"}
    names |= {f"{layer}.{kind}" for layer in ("frozen", "hidden", "back") for kind in ("weight", "bias")}
    assert set(reader.manifest.tensors) == names
    assert json.loads((reader.path / "config.yaml").read_text())["module"] == "Tagger"
    for losses, _, states in gloo.run(1, go_on_alone, str(tmp_path / "None"))[0]:
        assert losses == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert len(states) == 12
        for key, tensor in states.items():
            state, _, name = key.partition(".")
            assert torch.equal(tensor, reader.tensor(name, state)), key
    for precision in ("bf16", "fp16"):
        reader = CheckpointReader(tmp_path / precision / "step-00000005")
        for name, weights in saved[precision]["before"].items():
            assert torch.equal(reader.tensor(name), weights.float()), name
        assert saved[precision]["losses"] == pytest.approx(expected, rel=0.02)
    assert reader.manifest.training.loss_scaler["cur_scale"] == 2**8


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise)


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, points: Tensor) -> Tensor:
        return self.layers(points).squeeze(-1)


def build_gan() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    return Generator(), Discriminator()


def gan_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(GLOBAL_BATCH, 2, generator=generator) + 2.0, torch.randn(GLOBAL_BATCH, 3, generator=generator)


def loss_of(logits: Tensor, is_real: bool) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)))


def gan_alone() -> list[tuple[float, float]]:
    generator, discriminator = build_gan()
    generates = torch.optim.Adam(generator.parameters(), lr=1e-2)
    judges = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        real, noise = gan_batch(step)
        fake = generator(noise)
        judges.zero_grad()
        judged = loss_of(discriminator(real), True) + loss_of(discriminator(fake.detach()), False)
        judged.backward()
        judges.step()
        generates.zero_grad()
        deceived = loss_of(discriminator(fake), True)
        deceived.backward()
        generates.step()
        losses.append((judged.item(), deceived.item()))
    return losses


def gan_engines(zero: int) -> tuple[Any, Any]:
    import pipekit

    settings = config(zero, gradient_clipping=0.0)
    settings["optimizer"] = {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True, "adam_w_mode": False}}
    generator, discriminator = build_gan()
    first, *_ = pipekit.initialize(model=generator, config=settings)
    second, *_ = pipekit.initialize(model=discriminator, config=settings, mpu=first.mpu)
    return first, second


def train_gan(generator: Any, discriminator: Any, first: int, stop: int) -> list[tuple[float, float]]:
    losses = []
    for step in range(first, stop):
        real, noise = (
            part.chunk(generator.dp_world_size)[generator.mpu.data_parallel_rank] for part in gan_batch(step)
        )
        fake = generator(noise)
        judged = loss_of(discriminator(real), True) + loss_of(discriminator(fake.detach()), False)
        discriminator.backward(judged)
        discriminator.step()
        # The loss goes through the discriminator, whose weights get no gradient of it.
        discriminator.requires_grad_(False)
        deceived = loss_of(discriminator(fake), True)
        generator.backward(deceived)
        generator.step()
        discriminator.requires_grad_(True)
        both = torch.stack([judged.detach(), deceived.detach()])
        torch.distributed.all_reduce(both)
        losses.append((float(both[0]) / generator.dp_world_size, float(both[1]) / generator.dp_world_size))
    return losses


def train_gans(rank: int, folder: str) -> list[list[tuple[float, float]]]:
    results = []
    for zero in range(4):
        generator, discriminator = gan_engines(zero)
        losses = train_gan(generator, discriminator, 0, 6)
        for name, engine in {"generator": generator, "discriminator": discriminator}.items():
            engine.save_checkpoint(f"{folder}/{zero}/{name}")
        losses += train_gan(generator, discriminator, 6, STEPS)
        generator.destroy()
        # Its groups are there as long as the other engine is.
        discriminator.eval()
        discriminator(torch.ones(1, 2))
        discriminator.destroy()
        generator, discriminator = gan_engines(zero)
        for name, engine in {"generator": generator, "discriminator": discriminator}.items():
            engine.load_checkpoint(f"{folder}/{zero}/{name}")
        assert train_gan(generator, discriminator, 6, STEPS) == losses[6:]
        results.append(losses)
    return results


def test_two_engines_of_a_gan_train_as_torch_does_alone(gloo: GlooWorkers, tmp_path: Path) -> None:
    expected = torch.tensor(gan_alone())
    for results in gloo.run(2, train_gans, str(tmp_path)):
        for zero, losses in enumerate(results):
            torch.testing.assert_close(torch.tensor(losses), expected, rtol=1e-6, atol=1e-6, msg=f"ZeRO {zero}")


def go_back_wrongly(rank: int) -> None:
    weights = []
    for zero in (0, 1, 2, 3):
        engine, *_ = build(zero, accumulation=2)
        for micro_batch in range(4):
            engine.backward(engine(*batch(micro_batch)))
            # The gradients of other micro-batches than a step's last are added up.
            if micro_batch % 2 == 0:
                engine.backward(engine(*batch(9)))
            elif zero > 0:
                with pytest.raises(PipekitError, match="backward was called twice before step, and under ZeRO"):
                    engine.backward(engine(*batch(9)))
            engine.step()
        weights.append(torch.cat([tensor.flatten() for tensor in weights_of(engine).values()]))
        torch.testing.assert_close(weights[-1], weights[0])
        if zero == 0:  # whose gradients are all added up
            engine.backward(engine(*batch(0)))
            engine.step()
            for _ in range(2):
                engine.backward(engine(*batch(1)))
            engine.step()
        engine.destroy()
    generator, discriminator = gan_engines(0)
    with pytest.raises(PipekitError, match=r"another engine did, switch its module off meanwhile: engine.module.req"):
        generator.backward(loss_of(discriminator(generator(gan_batch(0)[1])), True))
    for engine in (generator, discriminator):
        engine.destroy()


def test_a_backward_whose_gradients_would_be_wrong_is_refused(gloo: GlooWorkers) -> None:
    gloo.run(1, go_back_wrongly)


def build_in_many_ways(rank: int, folder: str) -> list[list[float]]:
    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2)

    own = config(1)
    del own["optimizer"]
    path = Path(folder) / "config.json"
    if rank == 0:
        path.write_text(json.dumps(config(1)))
    torch.distributed.barrier()
    model = build_tagger()
    optimizer = adam(groups_of(model))
    ways: list[dict[str, Any]] = [
        {"config": str(path)},
        {"config": None, "config_params": config(1)},
        {"config": None, "args": SimpleNamespace(deepspeed_config=str(path), local_rank=rank)},
        {"config": own, "optimizer": adam},
        {"config": own, "optimizer": optimizer, "model": model, "model_parameters": None},
    ]
    results = [train(build(**way)[0], 0, 2) for way in ways]
    model = build_tagger()
    optimizer = adam(groups_of(model))
    schedule = scheduler(optimizer)
    engine, ours, _, given = build(config=own, model=model, model_parameters=None, optimizer=optimizer,
                                   lr_scheduler=schedule)  # fmt: skip
    assert given is engine.lr_scheduler is schedule
    results.append(train(engine, 0, 2))
    assert engine.get_lr() == [5e-3, 5e-3]
    assert ours is engine.optimizer
    return results


def test_configuration_optimizer_and_scheduler_come_in_every_way(gloo: GlooWorkers, tmp_path: Path) -> None:
    for results in gloo.run(2, build_in_many_ways, str(tmp_path)):
        assert len(results) == 6
        assert results == [results[0]] * 6


def evaluate_alone(rank: int, folder: str) -> list[float]:
    trained, *_ = build(2)
    train(trained, 0, 3)
    trained.save_checkpoint(folder)
    trained.eval()
    with torch.no_grad():
        losses = [float(trained(*batch(9)))]
    for zero in (0, 3):
        settings = config(zero)
        del settings["optimizer"]
        engine, *_ = build(config=settings, seed=2)
        assert engine.load_checkpoint(folder)[0] is not None
        with pytest.raises(PipekitError, match="this engine has no optimizer and only evaluates"):
            engine.backward(engine(*batch(9)))
        # What it saves, it loads.
        engine.save_checkpoint(f"{folder}/weights", tag="again")
        engine, *_ = build(config=settings, seed=3)
        engine.load_checkpoint(f"{folder}/weights")
        engine.eval()
        with torch.no_grad():
            losses.append(float(engine(*batch(9))))
    return losses


def test_without_an_optimizer_an_engine_evaluates(gloo: GlooWorkers, tmp_path: Path) -> None:
    for trained, *others in gloo.run(2, evaluate_alone, str(tmp_path)):
        assert others == pytest.approx([trained] * 2, rel=1e-6)


def read_loader(rank: int) -> list[list[list[int]]]:
    import deepspeed

    data = list(range(14))
    engine, _, loader, _ = build(training_data=data)
    _, _, reference, _ = deepspeed.initialize(model=build_tagger(), config=config(), training_data=data)
    in_order = engine.deepspeed_io(data, 7, "eval", num_local_io_workers=0)
    assert [part.tolist() for part in in_order] == [list(range(rank, 14, 2))]
    for each in (loader, reference):
        # The processes of tests may not have any of their own.
        each.num_local_io_workers = 0
    return [[part.tolist() for part in each] for each in (loader, reference)]


def test_training_data_come_in_deepspeeds_order(gloo: GlooWorkers) -> None:
    for ours, theirs in gloo.run(2, read_loader):
        assert ours == theirs
        assert [len(part) for part in ours] == [6, 1]


def skip_infinite(rank: int) -> list[tuple[int, int, float, bool]]:
    results = []
    for zero in range(4):
        engine, *_ = build(zero)
        train(engine, 0, 1)
        before = weights_of(engine)
        tokens, labels = batch(1)
        loss = engine(tokens[:6], labels[:6]) * (float("inf") if rank == 1 else 1.0)
        engine.backward(loss)
        engine.step()
        same = all(torch.equal(tensor, before[name]) for name, tensor in weights_of(engine).items())
        results.append((engine.skipped_steps, engine.global_steps, engine.grad_norm, same))
        train(engine, 2, 3)
        assert 0.0 < engine.grad_norm < 10.0
    return results


def test_infinite_gradients_skip_the_step_on_every_rank(gloo: GlooWorkers) -> None:
    for results in gloo.run(2, skip_infinite):
        assert results == [(1, 2, float("inf"), True)] * 4


def refuse_checkpoints(rank: int, folder: str) -> list[str]:
    engine, *_ = build(0, 3)
    mine = Path(folder) / ("shared" if rank == 0 else "other")
    train(engine, 0, 1)
    engine.save_checkpoint(f"{folder}/shared", tag="whole")
    narrower = narrow(build_tagger())
    other, *_ = build(model=narrower, model_parameters=groups_of(narrower))

    def in_between() -> None:
        engine.backward(engine(*(part[:2] for part in batch(0))))
        engine.step()
        engine.save_checkpoint(folder)

    uneven, *_ = build(config=config(optimizer={"type": "Adafactor", "params": {"lr": 1e-2}}))
    train(uneven, 0, 1)
    calls = [
        lambda: engine.save_checkpoint(folder, client_state={"bad": rank if rank == 0 else {1, 2}}),
        lambda: engine.save_checkpoint(folder, tag="a/b"),
        lambda: engine.save_checkpoint(folder, tag="latest"),
        lambda: engine.load_checkpoint(mine),
        lambda: other.load_checkpoint(f"{folder}/shared"),
        lambda: uneven.save_checkpoint(folder),
        in_between,
    ]
    messages = []
    for call in calls:
        with pytest.raises(PipekitError) as caught:
            call()
        messages.append(str(caught.value))
    assert engine.global_steps == 1
    torch.distributed.barrier()
    assert sorted(path.name for path in Path(folder).iterdir()) == ["shared"]
    return messages


def test_a_checkpoint_that_cannot_be_is_one_error_on_every_rank(gloo: GlooWorkers, tmp_path: Path) -> None:
    expected = [
        "client_state cannot be written as JSON: Object of type set is not JSON serializable",
        "tag='a/b' cannot be the name of a checkpoint",
        "tag='latest' cannot be the name of a checkpoint",
        "other/whole/manifest.json: is not there on this machine",
        "belongs to another model: hidden.weight is (5, 8) in it and (4, 8) in the model",
        "Adafactor has the states col_var, row_var, and a checkpoint holds only states with one number",
        "save_checkpoint was called between the micro-batches of a step, after 1 of 3, and a checkpoint holds",
    ]
    for messages in gloo.run(2, refuse_checkpoints, str(tmp_path)):
        for message, part in zip(messages, expected, strict=True):
            assert part in message
