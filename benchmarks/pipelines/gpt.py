"""The GPT that is trained for real."""

from __future__ import annotations

import torch

from pipekit.models.gpt2 import GPT2Config
from pipekit.models.transformer import language_model_loss
from pipelines.settings import GPTSetting
from pipelines.workload import Workload


def build_gpt_workload(setting: GPTSetting) -> Workload:
    """Return the layers of the model, one batch of random tokens, and AdamW."""
    config = GPT2Config(
        vocab_size=setting.vocab_size,
        hidden_size=setting.hidden_size,
        num_layers=setting.num_blocks,
        num_heads=setting.num_heads,
        max_positions=setting.sequence_length,
        # Torch's stages share no weights.
        tied_embedding=False,
    )
    num_sequences = setting.num_micro_batches * setting.micro_batch_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(setting.vocab_size, (num_sequences, setting.sequence_length), generator=generator)
    return Workload(
        specs=config.layer_specs(),
        pp=setting.pp,
        num_micro_batches=setting.num_micro_batches,
        precision=setting.precision,
        zero=1,
        loss_fn=language_model_loss,
        build_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        inputs=tokens,
        labels=tokens.roll(-1, dims=1),
    )
