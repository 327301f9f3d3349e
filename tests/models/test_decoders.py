"""Llama and its descendants as lists of layer specs, each against that of transformers."""

from __future__ import annotations

import re
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from decoder_kinds import KINDS
from hand_made import write_checkpoint
from pipekit.config import parse_config
from pipekit.costs.describe import describe_layers
from pipekit.errors import ConfigError, LayoutError
from pipekit.inference import export
from pipekit.inference.hugging_face import from_hf, read_hf_config, to_hf
from pipekit.layers.parameters import count_parameters, parameter_shapes
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import flow_of_spec
from pipekit.models import find_families
from pipekit.models.decoder import DecoderFamily
from pipekit.tensor_parallel import SHARDED, SequenceFlow
from tensor_parallel.outcomes import VOCAB, Outcome, assert_same, random_weights, run_sharded, tokens_and_labels
from their_models import assert_their_model_is_ours

RELEASED = {  # parameters, as the model cards or the files of the released models have them
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo": 12_247_782_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-4": 14_659_507_200,
}
DECODERS = {name: family for name, family in find_families().items() if issubclass(family, DecoderFamily)}
kinds = pytest.mark.parametrize("kind", KINDS)
FP32 = 1e-5
"""Tolerance: transformers computes norms in fp32 in a model of fp64, too."""


def small(kind: str, **changes: Any) -> DecoderFamily:
    """Model that four ranks can share out; they need not divide its vocabulary and its feed-forward width."""
    family, particular = KINDS[kind]
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 26}
    return DECODERS[family].model_validate({**sizes, "max_positions": 12, **particular, **changes})  # type: ignore[return-value]


@pytest.mark.parametrize("name", RELEASED)
def test_presets_have_the_published_numbers_of_parameters(name: str) -> None:
    model = parse_config({"model": {"preset": name}, "train": {"steps": 1}}).model
    assert isinstance(model, DecoderFamily)
    assert count_parameters(model.layer_specs()) == RELEASED[name]


def test_every_preset_is_counted() -> None:
    assert RELEASED.keys() == {preset for family in DECODERS.values() for preset in family.presets}


def test_initial_weights_are_as_configured() -> None:
    config = small("qwen3", hidden_size=192, num_layers=3, vocab_size=4000, ffn_size=800, init_std=0.05)
    for name, tensor in SequentialModel(config.layer_specs(), seed=3).logical_tensors().items():
        if tensor.dim() > 1:
            expected = 0.05 / 6**0.5 if re.search("projection|contract", name) else 0.05
            assert abs(float(tensor.detach().std()) / expected - 1) < 0.03, name
        else:
            assert torch.equal(tensor, torch.ones_like(tensor)), name


# Against transformers


@cache
def their_model(kind: str) -> Any:
    config = small(kind)
    stored = transformers.AutoConfig.for_model(**config.hf_config(end_token_id=0, dtype="float32"))
    # A token of padding would get no gradient.
    stored.pad_token_id = None
    weights = dict(to_hf(config, random_weights(config.layer_specs())))
    theirs: Any
    theirs, report = getattr(transformers, config.hf_class).from_pretrained(
        None, config=stored, state_dict=weights, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values()), report
    return theirs


@cache
def their_outcome(kind: str) -> Outcome:
    """Logits, loss and gradients of transformers, in fp64 with the weights of `random_weights`."""
    theirs = their_model(kind)
    tokens, labels = tokens_and_labels()
    logits = theirs(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: tensor.grad for name, tensor in theirs.named_parameters()}
    return Outcome(logits.detach(), loss.detach(), dict(from_hf(small(kind), gradients)))


@kinds
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole sequence", "sequence parallel"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_compute_what_transformers_does(size: int, kind: str, sequence_parallel: bool) -> None:
    config = small(kind)
    specs = config.layer_specs()
    if config.has_joint_projections and size > config.attention_heads.num_kv_heads:
        with pytest.raises(LayoutError, match=r"^parallel.tp=4 does not divide model.num_kv_heads=2; try .*=1 or 2$"):
            run_sharded(size, specs, random_weights(specs), sequence_parallel)
        return
    actual = run_sharded(size, specs, random_weights(specs), sequence_parallel)
    assert_same(actual, their_outcome(kind), tolerance=FP32)


@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_of_capped_scores_may_go_through_the_tokens_in_chunks(size: int) -> None:
    specs = small("gemma2").layer_specs(loss_chunk_tokens=5)
    assert_same(run_sharded(size, specs, random_weights(specs), False), their_outcome("gemma2"), tolerance=FP32)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("size", [1, 2])
def test_weight_gradients_may_be_put_off(size: int, kind: str) -> None:
    specs = small(kind).layer_specs()
    actual = run_sharded(size, specs, random_weights(specs), True, defer=True)
    assert_same(actual, their_outcome(kind), tolerance=FP32)


@kinds
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_a_model_of_theirs_computes_the_same_here(tmp_path: Path, kind: str, dtype: torch.dtype, rtol: float) -> None:
    assert_their_model_is_ours(small(kind), tmp_path, dtype=dtype, rtol=rtol)


@kinds
def test_exports_agree_layer_by_layer(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"model": small(kind).given(), "train": {"steps": 1, "sequence_length": 12}})
    write_checkpoint(tmp_path / "run", config, random_weights(small(kind).layer_specs()), tokenizer=None)
    monkeypatch.setattr(export, "_WHOLE_BYTES", 0)
    assert export.export_checkpoint(tmp_path / "run", tmp_path / "out").layer_by_layer


@kinds
def test_costs_are_counted_without_memory(kind: str) -> None:
    config, num_tokens = small(kind), 12
    specs = config.layer_specs()
    ids = torch.empty(2, num_tokens, dtype=torch.int64, device="meta")
    layers = describe_layers(specs, ids, dtype=torch.bfloat16).layers
    matrices = [shape for layer in parameter_shapes(specs)[1:] for shape in layer.values() if len(shape) == 2]
    windows = [config.window_of(block) for block in range(config.num_layers)]
    # Blocks of the first length over the window that divides 12, each with the one before.
    pairs = {None: 144, 3: 3 * 3 + 3 * 3 * 6, 4: 4 * 4 + 2 * 4 * 8, 5: 6 * 6 + 6 * 12, 4096: 144}
    products = 2 * 2 * 2 * config.num_heads * config.known_head_size
    expected = 2 * 2 * num_tokens * sum(map(prod, matrices)) + products * sum(pairs[window] for window in windows)
    assert sum(layer.forward_flops for layer in layers) == expected


@pytest.mark.parametrize("family", DECODERS)
def test_the_sequence_stays_sharded_from_the_embedding_to_the_head(family: str) -> None:
    first, *between, last = [flow_of_spec(spec) for spec in small(family).layer_specs()]
    assert first == SequenceFlow(returns_shard=True)
    assert set(between) == {SHARDED}
    assert last == SequenceFlow(takes_shard=True)


# Their configuration


@kinds
def test_their_configuration_describes_the_same_model(kind: str) -> None:
    config = small(kind, init_std=0.1, dropout=0.25)
    stored = config.hf_config(end_token_id=3, dtype="float32")
    assert read_hf_config(stored, where="out") == config
    theirs = transformers.AutoConfig.for_model(**stored).to_dict()
    assert "rope_parameters" in theirs, "transformers 5 has another place for them"
    assert read_hf_config(theirs, where="out") == config, "what transformers saves reads the same"
    assert (theirs["attention_dropout"], theirs["eos_token_id"]) == (0.25, 3)


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu'; only 'silu' or 'swish' is known"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2; only 1 is known"),
        (
            "llama",
            {"rope_scaling": {"type": "proportional", "factor": 2.0}},
            "rope_type='proportional'; only 'default', 'linear', 'dynamic', 'llama3', 'yarn' or 'longrope' are known",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 6, "x": 1}},
            "rope_type='yarn' with x; that is not known",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types=\['full_attention', 'sliding_attention'\]; only blocks from max_window_layers=28 .*",
        ),
        (
            "gemma2",
            {"layer_types": ["full_attention"] * 2},
            r"layer_types=.*; only \['sliding_attention', .*\] is known",
        ),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0; only None is known"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True; only False or None .*"),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type='linear' with a window; only 'default' is known",
        ),
    ],
)
def test_a_model_that_computes_something_else_is_refused(kind: str, change: dict[str, Any], fault: str) -> None:
    stored = {**small(kind).hf_config(end_token_id=0, dtype="float32"), **change}
    with pytest.raises(ConfigError, match=rf"^out/config\.json: {fault}$"):
        read_hf_config(stored, where="out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4; try 1, 2 or 4"),
        (
            {"head_size": 5},
            "model.head_size=5 is odd, and rotary positions turn pairs of dimensions; make heads of an even size",
        ),
        (
            {"rotary_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "model.rotary_scaling.type=llama3 needs original_max_positions and high_freq_factor",
        ),
        (
            {"rotary_scaling": {"type": "linear", "factor": 8.0, "truncate": True}},
            "model.rotary_scaling.type=linear has no truncate; leave that out",
        ),
    ],
)
def test_sizes_that_do_not_fit_say_what_to_type(change: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 300}
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"family": "llama", **sizes, **change}, "train": {"steps": 1}})
    assert str(caught.value) == message
