"""Our GPT-2 against that of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipekit.errors import CheckpointError, ConfigError
from pipekit.inference.hugging_face import from_hf, read_hf_config, to_hf
from pipekit.layers.sequential import SequentialModel
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.transformer import language_model_loss

TOLERANCE = 1e-5  # of logits near 1, in fp32


def small(*, tied: bool) -> GPT2Config:
    return GPT2Config(
        vocab_size=97,
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        ffn_size=100,
        max_positions=20,
        tied_embedding=tied,
        layer_norm_eps=1e-3,
        init_std=0.15,
    )


def our_model(config: GPT2Config) -> SequentialModel:
    model = SequentialModel(config.layer_specs(), seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, tensor in model.logical_tensors().items():
            if "norm" in name or "bias" in name:  # so that a mixed-up one shows
                tensor += torch.randn(tensor.shape, generator=generator) * 0.1
    return model.eval()


def their_model(config: GPT2Config) -> Any:
    stored = config.hf_config(end_token_id=0, dtype="float32")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(stored)).eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(97, (2, 21), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def config(request: pytest.FixtureRequest) -> GPT2Config:
    return small(tied=request.param)


def load_into_theirs(config: GPT2Config, model: SequentialModel) -> Any:
    theirs = their_model(config)
    state = {name: tensor.detach() for name, tensor in to_hf(config, model.logical_tensors())}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tied_embedding else [])
    return theirs


def test_logits_are_equal(config: GPT2Config) -> None:
    ours = our_model(config)
    theirs = load_into_theirs(config, ours)
    inputs, _ = batch()
    with torch.no_grad():
        logits, reference = ours(inputs), theirs(inputs).logits
    assert float(reference.abs().max()) > 0.5, "small logits would be near whatever the weights are"
    assert float((logits - reference).abs().max()) <= TOLERANCE


def test_gradients_are_equal(config: GPT2Config) -> None:
    ours = our_model(config)
    theirs = load_into_theirs(config, ours)
    inputs, labels = batch()
    language_model_loss(ours(inputs), labels).backward()
    logits = theirs(inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    own = ours.logical_tensors()
    for rename in config.hf_renames():
        gradient, reference = own[rename.ours].grad, gradients[rename.theirs]
        assert gradient is not None
        assert float(reference.abs().max()) > 0, rename
        reference = reference if rename.pattern is None else reference.T
        assert float((gradient - reference).abs().max()) <= TOLERANCE, rename


@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["with the head", "bare, as released"])
def test_their_weights_load_into_ours(config: GPT2Config, prefix: str) -> None:
    torch.manual_seed(8)
    theirs = their_model(config)
    state = {name.replace("transformer.", prefix): tensor for name, tensor in theirs.state_dict().items()}
    ours = SequentialModel(config.layer_specs()).eval()
    ours.load_logical_tensors(dict(from_hf(config, state)), where="theirs")
    inputs, _ = batch()
    with torch.no_grad():
        assert float((ours(inputs) - theirs(inputs).logits).abs().max()) <= TOLERANCE


def test_there_and_back_is_the_same(config: GPT2Config) -> None:
    tensors = our_model(config).logical_tensors()
    back = dict(from_hf(config, dict(to_hf(config, tensors))))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_is_renamed_once(config: GPT2Config) -> None:
    renames = config.hf_renames()
    assert sorted(r.ours for r in renames) == sorted(our_model(config).logical_tensors())
    theirs = {name for name, _ in their_model(config).named_parameters()}
    assert {r.theirs for r in renames} == theirs
    assert len({r.theirs for r in renames}) == len(renames)


def test_the_exported_parameters_are_counted_alike(config: GPT2Config) -> None:
    ours = sum(parameter.numel() for parameter in our_model(config).parameters())
    assert ours == their_model(config).num_parameters()


def test_their_configuration_describes_the_same_model(config: GPT2Config) -> None:
    stored = config.hf_config(end_token_id=3, dtype="float32")
    assert read_hf_config(stored, where="out") == config
    theirs = transformers.GPT2Config.from_dict(stored).to_dict()
    assert read_hf_config(theirs, where="out") == config, "what transformers saves reads the same"
    assert (theirs["eos_token_id"], theirs["bos_token_id"]) == (3, 3)


def test_the_released_configuration_is_our_preset() -> None:
    stored = transformers.GPT2Config().to_dict()  # its defaults are the released gpt2
    assert read_hf_config(stored, where="gpt2") == GPT2Config(preset="gpt2", dropout=0.1).model_copy(
        update={"preset": None}
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mamba"),
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_a_model_that_computes_something_else_is_refused(key: str, value: object) -> None:
    stored = {**small(tied=True).hf_config(end_token_id=0, dtype="float32"), key: value}
    with pytest.raises(ConfigError, match=rf"^out/config\.json: {key}={value!r}; only .* is known$"):
        read_hf_config(stored, where="out")


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no vocab_size, n_embd, n_layer, n_head, n_positions,"):
        read_hf_config({"model_type": "gpt2"}, where="out")


def test_a_missing_tensor_is_named() -> None:
    config = small(tied=True)
    tensors = dict(to_hf(config, our_model(config).logical_tensors()))
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.mlp\.c_fc\.bias is missing"):
        dict(from_hf(config, tensors))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"n_head": 7}, "model.num_heads=7 does not divide model.hidden_size=48; try 3, 4, 6 or 8"),
        ({"n_layer": "three"}, "num_layers: Input should be a valid integer"),
        ({"n_layer": 0, "n_positions": -1}, "num_layers: .*greater than 0; max_positions: .*greater than 0"),
    ],
)
def test_sizes_that_are_none_are_refused(change: dict[str, Any], fault: str) -> None:
    stored = {**small(tied=True).hf_config(end_token_id=0, dtype="float32"), **change}
    with pytest.raises(ConfigError, match=rf"^out/config\.json: describes no GPT2LMHeadModel: {fault}$"):
        read_hf_config(stored, where="out")


def test_dropout_of_theirs_is_ours() -> None:
    config = small(tied=True).model_copy(update={"dropout": 0.25})
    stored = config.hf_config(end_token_id=0, dtype="float32")
    assert {stored[key] for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop")} == {0.25}
    assert read_hf_config(stored, where="out").dropout == 0.25
