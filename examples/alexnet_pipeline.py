"""AlexNet on generated images, cut into pipeline stages.

    pipekit launch --processes 2 examples/alexnet_pipeline.py

Every process holds one stage here; with more processes than stages there are replicas of the pipeline.

Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural Networks", in small.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipekit
from pipekit import LayerSpec

NUM_CLASSES = 6
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "steps_per_print": None,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}


class Stripes(torch.utils.data.Dataset):
    """Noisy images `(3, 32, 32)` of stripes, and the class that tells their direction."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        label = index % NUM_CLASSES
        angle = math.pi * label / NUM_CLASSES
        rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        phase = 2 * math.pi * torch.rand((), generator=generator)
        stripes = torch.sin(rows * math.cos(angle) + columns * math.sin(angle) + phase)
        return stripes + 0.3 * torch.randn(3, 32, 32, generator=generator), label


def alexnet(width: int) -> list[LayerSpec]:
    """Layers from images `(B, 3, 32, 32)` to logits `(B, NUM_CLASSES)`; nothing is built yet."""
    return [
        LayerSpec(nn.Conv2d, 3, width, 3, stride=2, padding=1),
        LayerSpec(nn.ReLU),
        LayerSpec(nn.MaxPool2d, 2),
        LayerSpec(nn.Conv2d, width, 3 * width, 3, padding=1),
        LayerSpec(nn.ReLU),
        LayerSpec(nn.MaxPool2d, 2),
        LayerSpec(nn.Conv2d, 3 * width, 6 * width, 3, padding=1),
        LayerSpec(nn.ReLU),
        LayerSpec(nn.Conv2d, 6 * width, 4 * width, 3, padding=1),
        LayerSpec(nn.ReLU),
        LayerSpec(nn.Conv2d, 4 * width, 4 * width, 3, padding=1),
        LayerSpec(nn.ReLU),
        LayerSpec(nn.MaxPool2d, 2),
        LayerSpec(nn.Flatten),
        LayerSpec(nn.Dropout, 0.1),
        LayerSpec(nn.Linear, 16 * width, 32 * width),
        LayerSpec(nn.ReLU),
        LayerSpec(nn.Dropout, 0.1),
        LayerSpec(nn.Linear, 32 * width, NUM_CLASSES),
    ]


class AlexNetTrial(pipekit.Trial):
    def __init__(self, context: pipekit.TrialContext) -> None:
        self.context = context
        module = pipekit.PipelineModule(
            alexnet(context.get_hparam("width")),
            num_stages=context.get_hparam("stages"),
            loss_fn=F.cross_entropy,
            device=context.device,
        )
        engine, *_ = pipekit.initialize(model=module, config=CONFIG)
        self.engine = context.wrap_model_engine(engine)

    def train_batch(self, dataloader_iter, epoch_idx: int, batch_idx: int) -> Tensor:
        return self.engine.train_batch(dataloader_iter)

    def evaluate_batch(self, dataloader_iter, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.engine.eval_batch(dataloader_iter)}

    def build_training_data_loader(self) -> pipekit.DataLoader:
        return pipekit.DataLoader(Stripes(960), batch_size=8, shuffle=True, drop_last=True)

    def build_validation_data_loader(self) -> pipekit.DataLoader:
        return pipekit.DataLoader(Stripes(64), batch_size=8)


def main() -> None:
    settings = {"hparams": {"width": 8, "stages": 2}, "exp_conf": {"run": {"dir": "runs/alexnet_pipeline"}}}
    with pipekit.init(**settings) as context:
        pipekit.Trainer(AlexNetTrial(context), context).fit(
            max_length=pipekit.Epoch(2), validation_period=pipekit.Epoch(1), reporting_period=pipekit.Batch(10)
        )


if __name__ == "__main__":
    main()
