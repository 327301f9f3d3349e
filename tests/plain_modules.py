"""A plain module that tests train, its data, its engines, and a step in three micro-batches or one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, STEPS = 11, 8, 10
# Of 12 samples, each of two replicas reads 6: in one micro-batch, or in three.
GLOBAL_BATCH = 12


class Tagger(nn.Module):
    """Has a frozen parameter, a buffer, one that is not saved, and a head that shares the weights of the embedding."""

    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(WIDTH, 5)
        self.back = nn.Linear(5, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.head.weight = self.embedding.weight
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))
        self.register_buffer("passing", torch.ones(()), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self.counted += len(tokens)
        x = torch.tanh(self.frozen(self.embedding(tokens)))
        return F.cross_entropy(self.head(self.back(torch.tanh(self.hidden(x)))), labels)


def build_tagger(seed: int = 1) -> Tagger:
    torch.manual_seed(seed)
    return Tagger()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": 0.1},
        {"params": [each for each in parameters if each.ndim == 1], "weight_decay": 0.0},
    ]


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (GLOBAL_BATCH,), generator=torch.Generator().manual_seed(step))
    return tokens, (tokens * 3 + 1) % VOCAB


def config(zero: int = 0, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "train_batch_size": GLOBAL_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "steps_per_print": None,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
        **changes,
    }


def build(zero: int = 0, accumulation: int = 1, *, seed: int = 1, **given: Any) -> Any:
    import pipekit

    changes = given.pop("changes", {})
    model = build_tagger(seed)
    arguments = {"model": model, "model_parameters": groups_of(model), "config": config(zero, accumulation, **changes)}
    return pipekit.initialize(**{**arguments, **given})


def train(engine: Any, first: int = 0, stop: int = STEPS) -> list[float]:
    """Train as a script of DeepSpeed's does, and return the mean losses over all replicas and micro-batches."""
    losses = []
    for step in range(first, stop):
        tokens, labels = (part.chunk(engine.dp_world_size)[engine.mpu.data_parallel_rank] for part in batch(step))
        total = torch.zeros(())
        size = engine.train_micro_batch_size_per_gpu()
        for start in range(0, len(tokens), size):
            loss = engine(tokens[start : start + size], labels[start : start + size])
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() * size / len(tokens)
        torch.distributed.all_reduce(total)
        losses.append(float(total) / engine.dp_world_size)
    return losses


def weights_of(engine: Any) -> dict[str, Tensor]:
    view = engine.view
    return {
        name: (view.full_master if view.updates(each) else view.full_frozen)(each).clone()
        for name, each, _ in engine.logical.named_logical_parameters()
    }


def narrow(model: nn.Module) -> nn.Module:
    model.hidden = nn.Linear(WIDTH, 4)
    return model
