"""The families, found by their files, and the model of a configuration."""

from __future__ import annotations

from typing import Any

import pytest

from pipekit.config import Config, load_config, parse_config
from pipekit.errors import ConfigError
from pipekit.models import build_layers, family_of, find_families, preset_families
from pipekit.models.custom import CustomModelConfig
from pipekit.models.family import AttentionHeads, TransformerFamily
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.gpt_neox import GPTNeoXConfig

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 300}


def model_of(values: object) -> Any:
    return parse_config({"model": values, "train": {"steps": 1}}).model


def test_a_family_is_built_from_its_sizes() -> None:
    sizes = {"preset": "tiny", "vocab_size": 300, "num_layers": 2}
    specs = build_layers(parse_config({"model": sizes, "train": {"steps": 1}}))
    assert list(map(repr, specs)) == list(map(repr, GPT2Config(**sizes).layer_specs()))


def test_families_are_found_by_their_files() -> None:
    found = find_families()
    others = {"gemma2", "gemma3", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}
    assert set(found) == {"gpt2", "gpt_neox", *others}
    assert (found["gpt2"], found["gpt_neox"]) == (GPT2Config, GPTNeoXConfig)


def test_presets_are_unique_over_families() -> None:
    presets = [preset for family in find_families().values() for preset in family.presets]
    assert sorted(presets) == sorted(preset_families())
    assert next(iter(preset_families())) == "tiny"


@pytest.mark.parametrize("family", find_families().values())
def test_a_family_says_what_the_door_asks_for(family: type[TransformerFamily]) -> None:
    model = family(**SIZES, vocab_size=50)  # type: ignore[arg-type]
    assert len(model.layer_specs()) == model.num_layer_specs
    terms = [int(word.rpartition("=")[2]) for word in model.layer_count.replace(",", "").split() if word[-1].isdigit()]
    assert terms[0] * terms[1] + terms[2] == model.num_layer_specs
    assert set(family.presets) == {*family.model_json_schema()["properties"]["preset"]["anyOf"][0]["enum"]}
    assert set(family.hf_keys) <= set(family.model_fields)
    assert model.attention_heads.fault(2) is None
    assert model.dropouts == {}
    assert family(**SIZES, dropout=0.5).dropouts == {"model.dropout": 0.5}  # type: ignore[arg-type]


def test_the_family_then_the_preset_decide_who_reads_a_section() -> None:
    assert family_of({"family": "gpt_neox"}) is GPTNeoXConfig
    assert family_of({"preset": "pythia-1b"}) is GPTNeoXConfig
    assert family_of({"preset": "pythia-1c"}) is GPTNeoXConfig, "a misspelt preset"
    assert family_of(SIZES) is GPT2Config
    assert family_of({"builder": "a:b"}) is family_of("a:b") is CustomModelConfig
    assert family_of(3) is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"family": "gpt_neo", **SIZES}, "model.family=gpt_neo: must be gemma2, .* or qwen3; did you mean gpt_neox?"),
        ({"preset": "pythia-70b"}, "model.preset=pythia-70b: must be pythia-14m, .* did you mean pythia-70m?"),
        (
            {"preset": "tiny", "rotary_pct": 1.0},
            "model.rotary_pct: unknown key; it is a setting of .*=gpt_neox",
        ),
        ({"preset": "pythia-70m", "num_kv_head": 2}, "model.num_kv_head: unknown key; did you mean 'model.num_heads'?"),
        ({"family": "gpt_neox"}, "model.hidden_size, .* are missing; .* for example model.preset=pythia-14m"),
        ({"family": "gpt2", "preset": "pythia-70m"}, "model.preset=pythia-70m: must be tiny, .*"),
    ],
)
def test_a_section_that_fits_no_family_says_what_to_type(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message.replace('?', '[?]')}$"):
        model_of(model)


@pytest.mark.parametrize("model", [{"preset": "pythia-14m"}, {"family": "gpt_neox", **SIZES}])
def test_a_family_survives_changes_and_the_file(model: dict[str, Any], tmp_path: Any) -> None:
    config = parse_config({"model": model, "train": {"steps": 1}})
    changed = config.updated({"model.vocab_size": 50})
    assert changed.model == GPTNeoXConfig(**{**model, "vocab_size": 50})
    (tmp_path / "c.yaml").write_text(changed.to_yaml())
    assert load_config(tmp_path / "c.yaml").model == changed.model
    assert Config(model=model, train={"steps": 1}).model == config.model  # type: ignore[arg-type]


def test_a_degree_that_does_not_share_out_the_heads_says_which_do() -> None:
    assert AttentionHeads(12, 2).fault(4) is None, "ranks may share a head of keys and values"
    fault = AttentionHeads(12, 6).fault(4)
    assert fault is not None
    assert fault.message.endswith("one must divide the other; try parallel.tp=1, 2 or 3")
