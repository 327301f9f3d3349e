"""A pipeline engine of DeepSpeed's own, beside pipekit's on the same layers, data and configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gloo_workers import GlooWorkers

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VOCAB, WIDTH, NUM_SAMPLES = 13, 8, 11


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Growing(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Pairs of samples, each longer than the last: out of their order they cannot be stacked."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = (torch.arange(4 + index // 2) * (index + 3)) % VOCAB
        return tokens, (tokens * 5 + 1) % VOCAB


class Hidden(nn.Linear):
    """A layer whose forward torch compiles; it leaves its own alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight, self.bias))


def layers() -> list[nn.Module]:
    return [nn.Embedding(VOCAB, WIDTH), Hidden(WIDTH, WIDTH), Hidden(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)]


def config(folder: Path, name: str) -> dict[str, Any]:
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        # Its default is 1, and DeepSpeed counts the first stage alone.
        "gradient_clipping": 0.0,
        "steps_per_print": 1000,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5, "momentum": 0.9}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5, "warmup_num_steps": 4}},
        "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": name},
    }


def build_theirs(folder: Path) -> Any:
    from deepspeed.pipe import PipelineModule

    import deepspeed
    from pipekit.deepspeed.patches import use_joined_processes

    use_joined_processes()
    torch.manual_seed(1)
    module = PipelineModule(
        layers(), num_stages=2, loss_fn=loss_fn, partition_method="uniform", dynamic_shape=True, seed_layers=True
    )
    settings = config(folder, "theirs")
    settings["timers"] = {"throughput": {"enabled": False}}
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=settings)
    # Neither processes that read, nor pinned memory, which needs a GPU.
    engine.deepspeed_io = partial(engine.deepspeed_io, num_local_io_workers=0, pin_memory=False)
    engine._build_data_iter(Growing())
    return engine


def build_ours(folder: Path, weights: Path) -> Any:
    import pipekit

    module = pipekit.PipelineModule(layers(), num_stages=2, loss_fn=loss_fn, partition_method="uniform")
    module.load_state_dir(weights)
    engine, *_ = pipekit.initialize(model=module, config=config(folder, "ours"), training_data=Growing())
    return engine


def micro_batches(num: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (num, 2, 6), generator=generator)
    return [(each, (each + 1) % VOCAB) for each in tokens]


def evaluate(engine: Any) -> dict[str, Any]:
    def of(num: int = 2, **options: Any) -> Any:
        # DeepSpeed adds outputs to the losses of before, which have another shape.
        engine.total_loss = None
        return engine.eval_batch(iter(micro_batches(num)), **options)

    mean = of()
    # With it, DeepSpeed crashes at everything but the mean of the losses.
    engine.monitor.enabled = False
    results = {
        "mean": mean,
        "own": of(bcast_loss=False),
        "short": of(1, num_micro_batches=1),
        "long": of(3, num_micro_batches=3, reduce_output="AVG"),
        "each": of(reduce_output=None, bcast_loss=False),
        "outputs": of(compute_loss=False),
        "logits": of(return_logits=True),
    }
    engine.monitor.enabled = True
    return results


def step_on(engine: Any) -> list[float]:
    """Losses over two epochs, with another batch size from the middle on, and then of another loader."""
    losses = [float(engine.train_batch()) for _ in range(5)]
    engine.set_train_batch_size(6)
    losses += [float(engine.train_batch()) for _ in range(3)]
    engine.set_dataloader(micro_batches(6, seed=1))
    return losses + [float(engine.train_batch()) for _ in range(2)]


def compare(rank: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    theirs = build_theirs(root)
    theirs.module.save_state_dict(str(root / "start"), checkpoint_engine=theirs.checkpoint_engine)
    torch.distributed.barrier()
    ours = build_ours(root, root / "start")
    evaluations = [evaluate(engine) for engine in (theirs, ours)]
    losses = [step_on(engine) for engine in (theirs, ours)]
    counts = []
    for engine in (theirs, ours):
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        engine.compile(backend=backend)
        loss = engine.train_batch(iter(micro_batches(3, seed=2)))
        losses[len(counts)].append(float(loss))
        counts.append(len(graphs))
    # Written by ours, read by theirs, which has other weights meanwhile.
    ours.module.save_state_dict(root / "end")
    torch.distributed.barrier()
    with torch.no_grad():
        for parameter in theirs.module.parameters():
            parameter.zero_()
    theirs.module.load_state_dir(str(root / "end"), checkpoint_engine=theirs.checkpoint_engine)
    read = list(theirs.module.parameters())
    assert len(read) > 0
    assert all(map(torch.equal, read, ours.module.parameters()))
    return {"evaluations": evaluations, "losses": losses, "graphs": counts, "last": ours.is_last_stage()}


def test_two_stages_do_what_deepspeeds_do(gloo: GlooWorkers, tmp_path: Path) -> None:
    for result in gloo.run(2, compare, str(tmp_path)):
        theirs, ours = result["losses"]
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert len(set(ours)) == len(ours)
        assert result["graphs"][1] == result["graphs"][0] > 0
        theirs, ours = result["evaluations"]
        for name in ("mean", "short", "long"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5), name
        if result["last"]:
            assert [float(each) for each in ours["each"]] == pytest.approx([float(each) for each in theirs["each"]])
            assert float(ours["own"]) == pytest.approx(float(theirs["own"]), rel=1e-5)
            torch.testing.assert_close(ours["outputs"], theirs["outputs"])
            # DeepSpeed keeps the last micro-batch alone.
            torch.testing.assert_close(ours["logits"][1][-2:], theirs["logits"][1])
    for name in ("train_loss", "lr", "eval_loss"):
        theirs, ours = (
            (tmp_path / who / f"Train_Samples_{name}.csv").read_text().split() for who in ("theirs", "ours")
        )
        assert len(ours) > 1, name
        for row, own in zip(theirs[1:], ours[1:], strict=True):
            expected, found = ([float(cell) for cell in each.split(",")] for each in (row, own))
            assert found == pytest.approx(expected, rel=1e-4), name
