"""A transformer whose weights, gradients and optimizer states are kept in host memory and sharded over all ranks.

    pipekit launch --processes 2 examples/zero3_offload.py

Under ZeRO-3 each rank keeps a part of every tensor, and fetches the rest as layers need it; with the offload, parts
stay in the memory of the CPU. On a machine without GPUs the arithmetic is the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipekit

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_print": None,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
        # Smaller tensors stay whole on each rank; by default those of up to 100,000 elements.
        "stage3_param_persistence_threshold": 0,
    },
}


class Waves(torch.utils.data.Dataset):
    """The first 16 points of a wave, `(16, 1)`, and each next one, `(16, 1)`."""

    def __init__(self, num_waves: int) -> None:
        self.num_waves = num_waves

    def __len__(self) -> int:
        return self.num_waves

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        speed, phase = torch.rand(2, generator=torch.Generator().manual_seed(index))
        wave = torch.sin((0.2 + speed) * torch.arange(17.0) + 6 * phase)[:, None]
        return wave[:-1], wave[1:]


class WaveTransformer(nn.Module):
    """A causal transformer from points `(B, S, 1)` to the next ones."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.widen = nn.Linear(1, width)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers)
        self.narrow = nn.Linear(width, 1)

    def forward(self, points: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(points.shape[1], device=points.device)
        return self.narrow(self.layers(self.widen(points), mask=mask, is_causal=True))


class WavesTrial(pipekit.Trial):
    def __init__(self, context: pipekit.TrialContext) -> None:
        self.context = context
        model = WaveTransformer(context.get_hparam("width"), num_layers=2)
        # Updates happen on the CPU, with the optimizer that is given; DeepSpeed's DeepSpeedCPUAdam is faster there.
        optimizer = torch.optim.AdamW(model.parameters(), lr=context.get_hparam("lr"))
        engine, *_ = pipekit.initialize(model=model, optimizer=optimizer, config=CONFIG)
        self.engine = context.wrap_model_engine(engine)

    def train_batch(self, dataloader_iter, epoch_idx: int, batch_idx: int) -> Tensor:
        points, following = self.context.to_device(next(dataloader_iter))
        loss = F.mse_loss(self.engine(points), following)
        self.engine.backward(loss)
        self.engine.step()
        return loss

    def build_training_data_loader(self) -> pipekit.DataLoader:
        return pipekit.DataLoader(Waves(256), batch_size=4)


def main() -> None:
    settings = {"hparams": {"width": 64, "lr": 1e-3}, "exp_conf": {"run": {"dir": "runs/zero3_offload"}}}
    with pipekit.init(**settings) as context:
        pipekit.Trainer(WavesTrial(context), context).fit(
            max_length=pipekit.Epoch(2), reporting_period=pipekit.Batch(8)
        )


if __name__ == "__main__":
    main()
