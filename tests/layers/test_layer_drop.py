"""Progressive layer drop: its probabilities are those of the paper, and its draws follow them."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from pipekit.config import Config, parse_config
from pipekit.errors import ConfigError
from pipekit.layers.layer_drop import LayerDrop, number_blocks
from pipekit.layers.specs import LayerSpec, layer_names
from pipekit.models import build_layers
from pipekit.plan.decide import build_trained_layers
from pipekit.training.layers_trial import LayersTrial

DROP = LayerDrop(theta=0.5, gamma=0.001)


def test_theta_and_the_probabilities_are_those_of_the_paper() -> None:
    steps = np.arange(0, 10_000, 7)
    theta = (1 - 0.5) * np.exp(-0.001 * steps) + 0.5
    assert np.allclose([DROP.theta_at(int(step)) for step in steps], theta, atol=1e-9)
    for block in range(1, 13):
        found = [DROP.keep_probability(block, 12, step=int(step)) for step in steps]
        assert np.allclose(found, 1 - block / 12 * (1 - theta), atol=1e-9)


def test_blocks_are_kept_as_often_as_they_should_be_and_count_for_those_left_out() -> None:
    keep = DROP.keep_probability(3, 4, step=500)
    scales = [DROP.draw_scale(3, 4, seed=1, step=500, micro_batch=index) for index in range(4000)]
    assert {scale for scale in scales if scale is not None} == {1 / keep}
    # Four standard deviations.
    assert sum(scale is not None for scale in scales) / 4000 == pytest.approx(keep, abs=4 * 0.5 / 4000**0.5)
    assert DROP.draw_scale(4, 4, seed=1, step=0, micro_batch=0) == 1.0


@pytest.mark.parametrize(("family", "layers_of_block"), [("gpt2", 2), ("llama", 2), ("gpt_neox", 1)])
def test_the_layers_of_a_block_have_one_number(family: str, layers_of_block: int) -> None:
    model = {"family": family, "vocab_size": 50, "hidden_size": 8, "num_layers": 3, "num_heads": 1, "max_positions": 8}
    specs = build_layers(parse_config({"model": model, "train": {"steps": 1, "sequence_length": 8}}))
    numbers = number_blocks(specs)
    assert list(numbers.values()) == [block for block in (1, 2, 3) for _ in range(layers_of_block)]
    assert {name.split(".")[0] for idx, name in enumerate(layer_names(specs)) if idx in numbers} == {"blocks"}


class WithoutBlocks(LayersTrial):
    @classmethod
    def build_layers(cls, config: Config) -> list[LayerSpec]:
        return [LayerSpec(nn.Linear, 2, 2)]


def test_a_model_without_blocks_is_refused_before_anything_starts() -> None:
    config = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 1, "layer_drop": True}})
    with pytest.raises(ConfigError, match=r"train.layer_drop: no layer of the model can be left out; give the class"):
        build_trained_layers(config, WithoutBlocks)
