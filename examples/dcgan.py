"""A DCGAN on generated images: two engines, a generator and a discriminator, which train in turn.

    python examples/dcgan.py
    pipekit launch --processes 2 examples/dcgan.py

Run again, it goes on from its newest checkpoint, if `max_length` has grown. Shapes: B images, N numbers of noise.

Source: Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks", with group norms in place of batch norms, whose running means would differ between replicas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipekit

NOISE = 16
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_print": None,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 1},
}


class Spots(torch.utils.data.Dataset):
    """Images `(1, 16, 16)` of a bright spot somewhere, from -1 to 1."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Tensor:
        place = 4 + 8 * torch.rand(2, generator=torch.Generator().manual_seed(index))
        rows, columns = ((torch.arange(16) - centre) ** 2 for centre in place)
        return 2 * torch.exp(-(rows[:, None] + columns[None]) / 8)[None] - 1


def build_generator() -> nn.Module:
    """Noise `(B, N, 1, 1)` to images `(B, 1, 16, 16)`."""
    return nn.Sequential(
        nn.ConvTranspose2d(NOISE, 32, 4), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Tanh(),
    )  # fmt: skip


def build_discriminator() -> nn.Module:
    """Images `(B, 1, 16, 16)` to logits `(B, 1)`, which are positive for those of the data."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.GroupNorm(4, 32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 1, 4), nn.Flatten(),
    )  # fmt: skip


def judge(logits: Tensor, label: float) -> Tensor:
    """Loss of logits `(B, 1)` that should say `label`."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


class DCGANTrial(pipekit.Trial):
    def __init__(self, context: pipekit.TrialContext) -> None:
        self.context = context
        self.generator = self.build_engine(build_generator())
        self.discriminator = self.build_engine(build_discriminator())

    def build_engine(self, module: nn.Module):
        optimizer = torch.optim.Adam(module.parameters(), lr=self.context.get_hparam("lr"), betas=(0.5, 0.999))
        engine, *_ = pipekit.initialize(model=module, optimizer=optimizer, config=CONFIG)
        return self.context.wrap_model_engine(engine)

    def make_images(self, number: int) -> Tensor:
        return self.generator(torch.randn(number, NOISE, 1, 1, device=self.context.device))

    def train_batch(self, dataloader_iter, epoch_idx: int, batch_idx: int) -> dict[str, Tensor]:
        images = self.context.to_device(next(dataloader_iter))
        made = self.make_images(len(images))
        told_apart = judge(self.discriminator(images), 1.0) + judge(self.discriminator(made.detach()), 0.0)
        self.discriminator.backward(told_apart)
        self.discriminator.step()
        # The generator's loss goes through the discriminator, which is to get no gradients of it.
        self.discriminator.module.requires_grad_(False)
        fooled = judge(self.discriminator.module(made), 1.0)
        self.generator.backward(fooled)
        self.generator.step()
        self.discriminator.module.requires_grad_(True)
        return {"discriminator_loss": told_apart, "generator_loss": fooled}

    def evaluate_batch(self, dataloader_iter, batch_idx: int) -> dict[str, Tensor]:
        images = self.context.to_device(next(dataloader_iter))
        made = self.make_images(len(images))
        return {
            "brightness_error": (made.mean() - images.mean()).abs(),
            "recognized": (self.discriminator(images) > 0).float().mean(),
        }

    def build_training_data_loader(self) -> pipekit.DataLoader:
        return pipekit.DataLoader(Spots(512), batch_size=8, shuffle=True)

    def build_validation_data_loader(self) -> pipekit.DataLoader:
        return pipekit.DataLoader(Spots(32), batch_size=8)


def main() -> None:
    with pipekit.init(hparams={"lr": 2e-3}, exp_conf={"run": {"dir": "runs/dcgan"}}) as context:
        pipekit.Trainer(DCGANTrial(context), context).fit(
            max_length=pipekit.Epoch(4), validation_period=pipekit.Epoch(1), reporting_period=pipekit.Batch(16)
        )


if __name__ == "__main__":
    main()
