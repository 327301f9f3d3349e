"""Layer specs."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_layer, build_on_meta, layer_names
from pipekit.rng import fold_seed


class Unbuildable(nn.Module):
    def __init__(self) -> None:
        raise AssertionError("listing a layer must not build it")


def test_listing_builds_nothing() -> None:
    spec = LayerSpec(Unbuildable)
    assert (repr(spec), spec.type_name) == ("LayerSpec(Unbuildable)", "Unbuildable")


def test_a_spec_shows_how_it_was_written() -> None:
    assert (
        repr(LayerSpec(nn.Linear, 4, 2, bias=False, name="head")) == "LayerSpec(Linear, 4, 2, bias=False, name='head')"
    )
    assert repr(TiedLayerSpec("embed", nn.Embedding, 4, 2)) == "TiedLayerSpec(Embedding, 4, 2)"


def test_a_factory_has_a_type_name() -> None:
    def make_layer() -> nn.Module:
        return nn.Identity()

    assert LayerSpec(make_layer).type_name == "make_layer"
    assert LayerSpec(partial(nn.Linear, 4), 2).type_name == "partial"


@pytest.mark.parametrize("typename", ["Linear", 3, None])
def test_a_typename_that_is_not_callable_is_refused(typename: object) -> None:
    with pytest.raises(ConfigError, match=r"LayerSpec takes an nn\.Module class, not .*; write LayerSpec\(nn\.Linear"):
        LayerSpec(typename)  # type: ignore[arg-type]


def test_a_module_that_is_built_already_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear\(\.\.\.\) is built already; write LayerSpec\(Linear, \.\.\.\)"):
        LayerSpec(nn.Linear(2, 2))


def test_a_tied_attribute_may_be_one_or_several() -> None:
    assert TiedLayerSpec("k", nn.Linear, 2, 2).tied_weight_attr == ["weight"]
    assert TiedLayerSpec("k", nn.Linear, 2, 2, tied_weight_attr=("weight", "bias")).tied_weight_attr == [
        "weight",
        "bias",
    ]


# Building


def test_weights_depend_on_the_seed_and_the_name_alone() -> None:
    spec = LayerSpec(nn.Linear, 5, 5)
    torch.manual_seed(0)
    first = build_layer(spec, name="a", seed=1).weight
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(build_layer(spec, name="a", seed=1).weight, first)  # type: ignore[arg-type]
    assert not torch.equal(build_layer(spec, name="b", seed=1).weight, first)  # type: ignore[arg-type]
    assert not torch.equal(build_layer(spec, name="a", seed=2).weight, first)  # type: ignore[arg-type]


def test_weights_are_those_of_torch_after_seeding() -> None:
    built = build_layer(LayerSpec(nn.Linear, 5, 5), name="a", seed=1)
    torch.manual_seed(fold_seed(1, "init", "a"))
    assert torch.equal(built.weight, nn.Linear(5, 5).weight)  # type: ignore[arg-type]


def test_the_generators_are_left_as_they_were() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    build_layer(LayerSpec(nn.Linear, 5, 5), name="a", seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # type: ignore[index]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generators_of_gpus_are_left_as_they_were() -> None:
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    build_layer(LayerSpec(nn.Linear, 5, 5), name="a", seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_layers_are_built_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert build_layer(LayerSpec(nn.Linear, 2, 2), name="a", seed=1).weight.device.type == "cpu"


def test_a_layer_on_meta_has_shapes_and_no_storage() -> None:
    layer = build_on_meta(LayerSpec(nn.Linear, 10**6, 10**6), name="large")
    assert layer.weight.shape == (10**6, 10**6)
    assert layer.weight.device.type == "meta"


@pytest.mark.parametrize("build", [partial(build_layer, seed=1), build_on_meta])
def test_arguments_that_do_not_fit_are_refused(build: partial[nn.Module]) -> None:
    with pytest.raises(ConfigError, match=r"^layer 'head' cannot be built from LayerSpec\(Linear, 4, wide=2\): .*wide"):
        build(LayerSpec(nn.Linear, 4, wide=2), name="head")


@pytest.mark.parametrize("build", [partial(build_layer, seed=1), build_on_meta])
def test_a_fault_inside_a_layer_is_not_hidden(build: partial[nn.Module]) -> None:
    class Faulty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        build(LayerSpec(Faulty), name="head")


def test_a_spec_that_builds_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 'a': LayerSpec\(dict\) built dict, which is not an nn\.Module"):
        build_layer(LayerSpec(dict), name="a", seed=1)  # type: ignore[arg-type]


# Names


def test_names_are_given_or_numbered() -> None:
    specs = [
        LayerSpec(nn.GELU),
        LayerSpec(nn.GELU, name="act"),
        TiedLayerSpec("k", nn.Linear, 2, 2),
        LayerSpec(nn.GELU),
    ]
    assert layer_names(specs) == ["layers.0", "act", "k", "layers.3"]


def test_a_tied_key_has_one_name_wherever_it_is_given() -> None:
    tied, named = TiedLayerSpec("k", nn.Linear, 2, 2), TiedLayerSpec("k", nn.Linear, 2, 2, name="shared")
    assert layer_names([named, tied]) == layer_names([tied, named]) == ["shared", "shared"]


@pytest.mark.parametrize(
    "specs",
    [
        [LayerSpec(nn.GELU, name="a"), LayerSpec(nn.GELU, name="a")],
        [LayerSpec(nn.GELU, name="layers.1"), LayerSpec(nn.GELU)],
        [LayerSpec(nn.GELU, name="k"), TiedLayerSpec("k", nn.Linear, 2, 2)],
        [TiedLayerSpec("j", nn.Linear, 2, 2, name="k"), TiedLayerSpec("k", nn.Linear, 2, 2)],
    ],
)
def test_a_name_given_twice_is_refused(specs: list[LayerSpec]) -> None:
    with pytest.raises(
        ConfigError, match=rf"^layer 1 .*is named .*another name=\.\.\. to its {type(specs[1]).__name__}$"
    ):
        layer_names(specs)


def test_one_key_with_two_names_is_refused() -> None:
    specs = [TiedLayerSpec("k", nn.Linear, 2, 2, name=name) for name in ("a", "b")]
    with pytest.raises(ConfigError, match=r"layer 1 is tied by key='k' and named 'b', and an earlier .* named 'a'"):
        layer_names(specs)


def test_one_key_with_two_classes_is_refused() -> None:
    specs = [TiedLayerSpec("k", nn.Embedding, 2, 2), TiedLayerSpec("k", nn.Linear, 2, 2)]
    with pytest.raises(ConfigError, match=r"layer 1 is tied by key='k' and builds Linear, .* builds Embedding"):
        layer_names(specs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TiedLayerSpec("k", nn.Linear, 2, 2), TiedLayerSpec("k", nn.Linear, 2, 3)),
        (TiedLayerSpec("k", nn.Linear, 2, 2), TiedLayerSpec("k", nn.Linear, 2, 2, bias=False)),
        (TiedLayerSpec("k", nn.Linear, 2, 2, bias=True), TiedLayerSpec("k", nn.Linear, 2, 2, bias=False)),
        (TiedLayerSpec("k", nn.Linear, 2, 2), TiedLayerSpec("k", nn.Linear, 2)),
        (TiedLayerSpec("k", nn.LayerNorm, [2, 3]), TiedLayerSpec("k", nn.LayerNorm, [2, 4])),
    ],
)
def test_one_key_with_other_arguments_is_refused(one: TiedLayerSpec, other: TiedLayerSpec) -> None:
    with pytest.raises(ConfigError) as caught:
        layer_names([one, other])
    assert f"layer 1 is tied by key='k' and is {other!r}, and an earlier layer of that key is {one!r}" in str(
        caught.value
    )


def test_arguments_that_cannot_be_compared_are_taken_for_equal() -> None:
    specs = [TiedLayerSpec("k", Weighted, torch.zeros(2), init=lambda weight: weight) for _ in range(2)]
    assert layer_names(specs) == ["k", "k"]


class Weighted(nn.Module):
    def __init__(self, weight: torch.Tensor, init: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def test_one_key_that_shares_other_parameters_is_refused() -> None:
    both = TiedLayerSpec("k", nn.Linear, 2, 2, tied_weight_attr=["weight", "bias"])
    with pytest.raises(
        ConfigError, match=r"layer 1 .* shares weight, and an earlier .* shares weight, bias; give both"
    ):
        layer_names([both, TiedLayerSpec("k", nn.Linear, 2, 2)])
    turned = TiedLayerSpec("k", nn.Linear, 2, 2, tied_weight_attr=["bias", "weight"])
    assert layer_names([both, turned]) == ["k", "k"]
