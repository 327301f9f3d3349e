"""GPT-NeoX as a list of layer specs, against that of transformers."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from pipekit.config import parse_config
from pipekit.errors import ConfigError
from pipekit.inference.hugging_face import from_hf, read_hf_config, to_hf
from pipekit.layers.parameters import count_parameters
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import flow_of_spec, layer_names
from pipekit.models.gpt_neox import GPTNeoXConfig
from pipekit.tensor_parallel import SHARDED, PlannedGroup, SequenceFlow
from tensor_parallel.outcomes import VOCAB, Outcome, assert_same, random_weights, run_sharded, tokens_and_labels
from tensor_parallel.sharded_model import CutModel, join_parameters
from their_models import assert_their_model_is_ours

RELEASED = {  # parameters in all, as the Pythia paper's table of sizes has them
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
}


def small(**changes: Any) -> GPTNeoXConfig:
    """Model that four ranks can share out; they need not divide its vocabulary and its feed-forward width."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 26}
    return GPTNeoXConfig(**{**sizes, "max_positions": 12, **changes})


@pytest.mark.parametrize("name", RELEASED)
def test_pythia_presets_have_the_published_numbers_of_parameters(name: str) -> None:
    assert count_parameters(GPTNeoXConfig(preset=name).layer_specs()) == RELEASED[name]  # type: ignore[arg-type]


def test_every_preset_names_its_family() -> None:
    for name in GPTNeoXConfig.presets:
        config = parse_config({"model": {"preset": name}, "train": {"steps": 1}})
        assert config.model == GPTNeoXConfig(preset=name)  # type: ignore[arg-type]
        assert config.updated({"train.steps": 2}).model == config.model
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 300}
    config = parse_config({"model": {"family": "gpt_neox", **sizes}, "train": {"steps": 1}})
    assert isinstance(config.updated({"model.vocab_size": 50}).model, GPTNeoXConfig)


def test_a_block_is_one_layer_or_two_with_the_same_tensors() -> None:
    parallel, halves = (small(use_parallel_residual=value) for value in (True, False))
    assert layer_names(parallel.layer_specs()) == ["embed", "blocks.0", "blocks.1", "final_norm", "head"]
    assert layer_names(halves.layer_specs())[1:3] == ["blocks.0.attention", "blocks.0.mlp"]
    for config in (parallel, halves):
        assert len(config.layer_specs()) == config.num_layer_specs
    tensors = [SequentialModel(config.layer_specs()).logical_tensors() for config in (parallel, halves)]
    assert tensors[0].keys() == tensors[1].keys()


@pytest.mark.parametrize("init_std", [None, 0.05])
def test_initial_weights_are_those_of_the_paper_or_as_configured(init_std: float | None) -> None:
    config = small(hidden_size=192, num_layers=3, vocab_size=4000, ffn_size=800, init_std=init_std)
    std = math.sqrt(2 / (192 + 4 * 192)) if init_std is None else init_std
    residual_std = 2 / (3 * math.sqrt(192)) if init_std is None else init_std / math.sqrt(6)
    for name, tensor in SequentialModel(config.layer_specs(), seed=3).logical_tensors().items():
        if tensor.dim() > 1:
            expected = residual_std if re.search("projection|contract", name) else std
            assert abs(float(tensor.detach().std()) / expected - 1) < 0.03, name


def test_dropout_acts_behind_the_embedding_attention_and_mlp_in_training_only() -> None:
    config = small(dropout=0.5)
    tokens = torch.randint(VOCAB, (2, 8))
    x = torch.randn(2, 8, 32)
    for spec, inputs in zip(config.layer_specs()[:2], (tokens, x), strict=True):
        layer = spec.build()
        assert not torch.equal(layer(inputs), layer(inputs))
        layer.eval()
        assert torch.equal(layer(inputs), layer(inputs))


@pytest.mark.parametrize(
    ("pct", "num_heads", "size", "remedy"),
    [
        (0.1, 4, "of the 8 dimensions of a head are 0", "try 0.25, 0.5 or 1.0"),
        (0.4, 4, "of the 8 dimensions of a head are 3", "try 0.25, 0.5 or 1.0"),
        (1.0, 32, "of the 1 dimensions of a head are 1", "make heads of an even size"),
    ],
)
def test_what_is_rotated_comes_in_pairs(pct: float, num_heads: int, size: str, remedy: str) -> None:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": num_heads, "max_positions": 300}
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"family": "gpt_neox", "rotary_pct": pct, **sizes}, "train": {"steps": 1}})
    assert str(caught.value) == f"model.rotary_pct={pct} {size}, and pairs of dimensions are rotated; {remedy}"


# Against transformers


@cache
def their_outcome(config: GPTNeoXConfig) -> Outcome:
    """Logits, loss and gradients of transformers, in fp64 with the weights of `random_weights`."""
    stored = transformers.GPTNeoXConfig.from_dict(config.hf_config(end_token_id=0, dtype="float32"))
    weights = dict(to_hf(config, random_weights(config.layer_specs())))
    theirs: Any
    theirs, report = transformers.GPTNeoXForCausalLM.from_pretrained(
        None, config=stored, state_dict=weights, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values()), report
    tokens, labels = tokens_and_labels()
    logits = theirs(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    # The head's name in files is that of transformers 4.
    gradients = {name.replace("lm_head.", "embed_out."): tensor.grad for name, tensor in theirs.named_parameters()}
    return Outcome(logits.detach(), loss.detach(), dict(from_hf(config, gradients)))


KINDS = {
    "pythia": {},
    "every dimension rotated": {"rotary_pct": 1.0},
    "sequential": {"use_parallel_residual": False},
    "tied": {"tied_embedding": True},
    "another base and activation": {"rotary_base": 500.0, "activation": "gelu_tanh", "use_parallel_residual": False},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole sequence", "sequence parallel"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_compute_what_transformers_does(size: int, kind: str, sequence_parallel: bool) -> None:
    config = small(**KINDS[kind])
    specs = config.layer_specs()
    actual = run_sharded(size, specs, random_weights(specs), sequence_parallel)
    assert_same(actual, their_outcome(config), tolerance=1e-7)


@kinds
@pytest.mark.parametrize("size", [1, 2])
def test_weight_gradients_may_be_put_off(size: int, kind: str) -> None:
    config = small(**KINDS[kind])
    specs = config.layer_specs()
    actual = run_sharded(size, specs, random_weights(specs), True, defer=True)
    assert_same(actual, their_outcome(config), tolerance=1e-7)


@kinds
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_a_model_of_theirs_computes_the_same_here(tmp_path: Path, kind: str, dtype: torch.dtype, rtol: float) -> None:
    assert_their_model_is_ours(small(init_std=0.02, **KINDS[kind]), tmp_path, dtype=dtype, rtol=rtol)


@pytest.mark.parametrize("parallel", [True, False])
def test_initial_weights_do_not_depend_on_the_ranks(parallel: bool) -> None:
    specs = small(use_parallel_residual=parallel).layer_specs()
    whole = SequentialModel(specs, seed=7).logical_tensors()
    ranks = [
        CutModel(specs, PlannedGroup(rank, 2), sequence_parallel=True, seed=7, dtype=torch.float32).parameters()
        for rank in range(2)
    ]
    joined = join_parameters(ranks)
    assert joined.keys() == whole.keys()
    for name, tensor in joined.items():
        assert torch.equal(tensor, whole[name]), name


def test_the_sequence_stays_sharded_from_the_embedding_to_the_head() -> None:
    first, *between, last = [flow_of_spec(spec) for spec in small().layer_specs()]
    assert first == SequenceFlow(returns_shard=True)
    assert set(between) == {SHARDED}
    assert last == SequenceFlow(takes_shard=True)


# Their configuration


@kinds
def test_their_configuration_describes_the_same_model(kind: str) -> None:
    config = small(**KINDS[kind], init_std=0.1, dropout=0.25)
    stored = config.hf_config(end_token_id=3, dtype="float32")
    assert read_hf_config(stored, where="out") == config
    theirs = transformers.GPTNeoXConfig.from_dict(stored).to_dict()
    assert "rotary_pct" not in theirs, "transformers 5 has another place for it"
    assert read_hf_config(theirs, where="out") == config, "what transformers saves reads the same"
    assert (theirs["attention_dropout"], theirs["hidden_dropout"], theirs["eos_token_id"]) == (0.25, 0.25, 3)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'; only 'gelu', 'gelu_new', .* is known"),
        ({"attention_bias": False}, "attention_bias=False; only True is known"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'; only 'default' is known"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'; only 'default' is known"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(change: dict[str, Any], fault: str) -> None:
    stored = {**small().hf_config(end_token_id=0, dtype="float32"), **change}
    with pytest.raises(ConfigError, match=rf"^out/config\.json: {fault}$"):
        read_hf_config(stored, where="out")
