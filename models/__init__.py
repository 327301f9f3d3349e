"""Models as lists of layer specs."""

from __future__ import annotations

from pipekit.config import Config, GPTConfig
from pipekit.layers.specs import LayerSpec
from pipekit.models.custom import build_custom, load_object
from pipekit.models.gpt import build_gpt2
from pipekit.models.loss import language_model_loss

__all__ = ["build_gpt2", "build_layers", "language_model_loss", "load_object"]


def build_layers(config: Config) -> list[LayerSpec]:
    """Return the layer specs of a configuration's model.

    Raises:
        ConfigError: if the model is the user's own and its builder does not return layer specs.
    """
    if isinstance(config.model, GPTConfig):
        # ZeRO-3 lets the weights of the head go before the loss.
        chunk = config.train.loss_chunk_tokens if config.parallel.zero < 3 else None
        return build_gpt2(config.model, loss_chunk_tokens=chunk)
    return build_custom(config)
