"""A configuration is a frozen value that survives YAML and pickle."""

from __future__ import annotations

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipekit.config import Config, load_config, parse_config
from pipekit.config.load import section_keys
from pipekit.config.schema import TrainConfig
from pipekit.errors import ConfigError
from pipekit.models.gpt2 import GPT2Config
from pipekit.settings.base import Section

letters = st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="~")
words = st.text(letters, min_size=1, max_size=12)
fractions = st.floats(0, 1, exclude_max=True)
positive = st.floats(min_value=1e-30, max_value=1e30)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Dicts that `parse_config` accepts, with most kinds of value."""
    heads, micro, micros = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    gpt = st.fixed_dictionaries(
        {"preset": st.sampled_from(["tiny", "gpt2", None]), "max_positions": st.just(512)},
        optional={
            "vocab_size": st.sampled_from(["auto", 77]),
            "dropout": st.floats(0, 0.95),
            "tied_embedding": st.booleans(),
        },
    ).map(lambda model: {**model, "hidden_size": 8 * heads, "num_layers": 3, "num_heads": heads})
    args = st.dictionaries(words, st.integers() | words | st.booleans() | st.lists(positive, max_size=3), max_size=3)
    own = st.fixed_dictionaries({"builder": st.just("a.b:c"), "args": args})
    return {
        "run": {
            "dir": draw(words),
            "timeout_s": draw(st.floats(0.1, 2e6)),
            "threads_per_process": draw(st.sampled_from(["auto", 3])),
        },
        "model": draw(gpt | own | st.just("my.module:build")),
        "parallel": {
            "pp": draw(st.integers(1, 4)),
            "dp": draw(st.sampled_from(["auto", 1])),
            "order": draw(st.permutations(["pipe", "data", "tensor"])),
        },
        "train": {
            "steps": draw(st.integers(10, 10**9)),
            "micro_batch_size": micro,
            "global_batch_size": micro * micros,
        },
        "optimizer": {"lr": draw(st.floats(1e-15, 1000)), "betas": [draw(fractions), draw(fractions)]},
        "scheduler": {
            "warmup_steps": draw(st.integers(0, 10)),
            "decay_steps": draw(st.sampled_from([None, 50])),
        },
        "data": {"source": draw(words | st.lists(words, min_size=1, max_size=3)), "text_key": draw(words)},
        "logging": {
            "wandb": draw(st.booleans() | st.fixed_dictionaries({}, optional={"project": words, "name": words}))
        },
        "deepspeed": draw(st.sampled_from([{}, {"zero_optimization": {"reduce_bucket_size": 5e8}}])),
    }


@given(configurations())
def test_yaml_loads_back_to_an_equal_configuration(values: dict[str, Any]):
    config = parse_config(values)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        again = load_config(path)
    assert again == config
    assert again.to_yaml() == config.to_yaml()


@given(configurations())
def test_pickle_keeps_a_configuration(values: dict[str, Any]):
    config = parse_config(values)
    assert pickle.loads(pickle.dumps(config)) == config


@given(configurations(), st.integers(1, 6))
def test_a_changed_key_changes_that_key_alone(values: dict[str, Any], seed: int):
    config = parse_config(values)
    assume(config.train.seed != seed)
    changed = config.updated({"train.seed": seed})
    assert changed.train.seed == seed
    assert changed.updated({"train.seed": config.train.seed}) == config


def test_yaml_shows_every_key():
    import yaml

    config = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 3}})
    shown = yaml.safe_load(config.to_yaml())
    assert set(shown) == set(Config.model_fields)
    assert set(shown["model"]) == set(GPT2Config.model_fields)
    assert (shown["model"]["hidden_size"], shown["optimizer"]["lr"]) == (128, 3e-4)


def test_values_that_yaml_cannot_hold_are_refused():
    config = parse_config({"model": {"builder": "a:b", "args": {"x": object()}}, "train": {"steps": 3}})
    with pytest.raises(ConfigError, match="holds a value that YAML cannot write"):
        config.to_yaml()


def test_a_configuration_is_frozen():
    config = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 3}})
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 4


def test_rules_hold_for_a_configuration_built_in_python():
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=8 is not a multiple"):
        Config(model=GPT2Config(preset="tiny"), train=TrainConfig(steps=3, micro_batch_size=3))


def test_decay_ends_with_the_run_unless_said_otherwise():
    config = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 30}})
    assert config.decay_steps == 30
    assert config.updated({"scheduler.decay_steps": 20}).decay_steps == 20


@pytest.mark.parametrize(("value", "logs"), [(True, True), (False, False), (None, False), ({"project": "p"}, True)])
def test_wandb_is_a_switch_or_a_mapping(value: object, logs: bool):
    values = {"model": {"preset": "tiny"}, "train": {"steps": 3}, "logging": {"wandb": value}}
    assert (parse_config(values).logging.wandb is not None) == logs


def sections() -> list[type[Section]]:
    found = [Section]
    for section in found:
        found.extend(section.__subclasses__())
    return found[1:]


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_explains_itself(section: type[Section]):
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no docstring"
        assert field.description.rstrip().endswith("."), f"{section.__name__}.{name}"


def test_every_example_is_accepted():
    """The examples stand in error messages: typing one must work."""
    base = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 300}})
    together = {
        "boundaries": {"parallel.partition": "manual", "parallel.pp": 2},
        "partition": {"parallel.pp": 1},
        "nvme_dir": {"parallel.offload": "nvme"},
        "momentum": {"optimizer.type": "sgd"},
        "stages_per_rank": {"parallel.schedule": "zb-v"},
        "max_in_flight": {"parallel.schedule": "auto"},
        "dp": {"train.global_batch_size": 8},
        "early_stopping": {"train.eval_interval": 100},
        "lm_eval": {"train.eval_interval": 100},
        "num_heads": {},
        "mixture": {},
        "stages": {
            "data.mixture": [{"name": "web", "source": "data/web"}, {"name": "code", "source": "data/code"}],
        },
        "max_positions": {},
        "lr": {},
        **{key: {"lora.rank": 16} for key in ("alpha", "targets", "base", "init_from")},
    }
    checked = 0
    for section, keys in section_keys().items():
        if not section or "." in section:
            continue
        for key in keys:
            kind = type(getattr(base, section))
            field = kind.model_fields.get(key)
            for example in (field.examples if field else None) or []:
                if example == "manual":
                    continue
                base.updated({**together.get(key, {}), f"{section}.{key}": example})
                checked += 1
    assert checked > 30
