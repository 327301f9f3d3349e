"""Attention cores that are recomputed: gradients to the bit, and bytes against the formulas of the paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_jobs import Case, model_specs
from pipekit.costs.describe import describe_layers
from pipekit.errors import ConfigError
from pipekit.layers.attention_core import recompute_attention, recompute_core
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec
from pipekit.models.transformer import language_model_loss
from pipekit.settings.activations import ActivationCheckpointing

ATTENTION = ActivationCheckpointing(only="attention")


def test_a_recomputed_attention_core_draws_the_same_masks_and_has_the_same_gradients() -> None:
    def gradients(specs: list[LayerSpec]) -> tuple[list[Tensor], int]:
        model, kept = SequentialModel(specs, seed=1), 0
        ids = torch.arange(32).view(2, 16)

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = language_model_loss(model(ids), ids)
        return list(torch.autograd.grad(loss, list(model.parameters()))), kept

    specs = model_specs(Case(dropout=0.2))
    plain, kept = gradients(specs)
    for setting in (ATTENTION, ActivationCheckpointing(layers="blocks.0.*", only="attention")):
        again, kept_now = gradients(recompute_attention(specs, setting))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, plain, strict=True))
        assert kept_now < kept
    assert kept_now > gradients(recompute_attention(specs, ATTENTION))[1]


class PlainAttention(nn.Module):
    """The attention of Korthikanti et al. 2022, figure 3: a matrix of all scores, with dropout."""

    recomputes_attention = False

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, 2))
        y = recompute_core(self.attend, q, k, v, draws=True) if self.recomputes_attention else self.attend(q, k, v)
        return F.dropout(self.projection(y.transpose(1, 2).flatten(2)), 0.1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        return F.dropout(scores.softmax(-1), 0.1) @ v


@pytest.mark.parametrize(("b", "s", "h", "a"), [(2, 16, 32, 4), (1, 64, 48, 6)])
def test_bytes_that_are_kept_and_recomputed_are_those_of_the_papers_formulas(b: int, s: int, h: int, a: int) -> None:
    specs = [LayerSpec(nn.Linear, h, h), LayerSpec(PlainAttention, h, a)]
    x = torch.empty(b, s, h, device="meta")
    whole = describe_layers(specs, x, dtype=torch.bfloat16).layers[1]
    part = describe_layers(recompute_attention(specs, ATTENTION), x, dtype=torch.bfloat16).layers[1]
    # Section 4.1: 11 s b h + 5 a s^2 b, of which the input is 2 s b h. Section 5: the second term is recomputed.
    assert whole.keeps_input
    assert part.keeps_input
    assert (whole.saved_bytes, whole.core_bytes) == (9 * s * b * h + 5 * a * s**2 * b, 0)
    assert (part.saved_bytes, part.core_bytes) == (9 * s * b * h, 5 * a * s**2 * b)
    # Both products of the core are made again, or all but the last, of which nothing is needed.
    again = part.input_gradient_flops - whole.input_gradient_flops
    assert again in (2 * b * s**2 * h, 4 * b * s**2 * h)
    assert part.weight_gradient_flops == whole.weight_gradient_flops


def test_a_model_without_a_core_to_recompute_is_refused() -> None:
    specs = [LayerSpec(nn.Linear, 4, 4), LayerSpec(PlainAttention, 4, 2)]
    assert [spec.recomputes_attention for spec in recompute_attention(specs, ATTENTION)] == [False, True]
    with pytest.raises(ConfigError) as raised:
        recompute_attention(specs, ActivationCheckpointing(only="attention", layers="layers.0"))
    assert str(raised.value) == (
        "train.activation_checkpointing.only=attention: none of the 1 layers that it chooses has an attention core "
        "that can be recomputed by itself, a module with the attribute recomputes_attention; try "
        "train.activation_checkpointing=true, which recomputes layers whole"
    )
