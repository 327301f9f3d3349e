"""A model in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipekit.errors import CheckpointError
from pipekit.layers.sequential import SequentialModel, run_layers
from pipekit.layers.specs import LayerSpec, TiedLayerSpec
from pipekit.rng import fold_seed


def unembed(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return x @ embedding.weight.T


def specs() -> list[LayerSpec]:
    return [
        TiedLayerSpec("embed", nn.Embedding, 11, 6),
        LayerSpec(nn.Linear, 6, 6, name="block.0.mix"),
        LayerSpec(nn.BatchNorm1d, 6),
        TiedLayerSpec("embed", nn.Embedding, 11, 6, forward_fn=unembed),
    ]


def test_the_sequential_model_runs_its_layers_in_order() -> None:
    model = SequentialModel(specs(), seed=4).eval()
    tokens = torch.arange(11)
    tensors = model.logical_tensors()
    x = tensors["embed.weight"][tokens]
    x = x @ tensors["block.0.mix.weight"].T + tensors["block.0.mix.bias"]
    x = x / (1 + 1e-5) ** 0.5  # a batch norm that has seen nothing yet
    torch.testing.assert_close(model(tokens), x @ tensors["embed.weight"].T)


def test_layers_run_one_at_a_time_as_the_whole_model_does() -> None:
    model = SequentialModel(specs(), seed=4).eval()
    tensors, read = model.logical_tensors(), []

    def read_one(name: str) -> Tensor:
        read.append(name)
        return tensors[name]

    outputs = run_layers(specs(), torch.arange(11), read=read_one)
    name, _ = next(outputs)
    assert (name, read) == ("embed", ["embed.weight"])
    *_, (name, last) = outputs
    assert name == "embed"
    assert torch.equal(last, model(torch.arange(11)))
    assert read == [*tensors, "embed.weight"]
    assert not last.requires_grad


def test_tied_layers_share_one_module_and_its_gradient_is_the_sum() -> None:
    model = SequentialModel(specs(), seed=4).eval()
    weight = model.logical_tensors()["embed.weight"]
    assert sum(parameter is weight for parameter in model.parameters()) == 1
    assert len(list(model.parameters())) == 1 + 2 + 2
    tokens = torch.tensor([2, 5])
    model(tokens).square().sum().backward()
    tensors = model.logical_tensors()
    reference = weight.detach().clone().requires_grad_()
    x = reference[tokens] @ tensors["block.0.mix.weight"].T + tensors["block.0.mix.bias"]
    (x / (1 + 1e-5) ** 0.5 @ reference.T).square().sum().backward()
    torch.testing.assert_close(weight.grad, reference.grad)


def test_tensors_and_buffers_have_logical_names() -> None:
    assert list(SequentialModel(specs()).logical_tensors()) == [
        "embed.weight",
        "block.0.mix.weight",
        "block.0.mix.bias",
        "layers.2.weight",
        "layers.2.bias",
        "layers.2.running_mean",
        "layers.2.running_var",
        "layers.2.num_batches_tracked",
    ]


def test_a_tied_key_that_is_named_once_is_one_module() -> None:
    named = [TiedLayerSpec("k", nn.Linear, 2, 2), TiedLayerSpec("k", nn.Linear, 2, 2, name="shared")]
    assert list(SequentialModel(named).logical_tensors()) == ["shared.weight", "shared.bias"]


def test_each_layer_is_seeded_by_its_name() -> None:
    model = SequentialModel(specs(), seed=4)
    torch.manual_seed(fold_seed(4, "init", "block.0.mix"))
    assert torch.equal(model.logical_tensors()["block.0.mix.weight"], nn.Linear(6, 6).weight)


def test_tensors_load_by_name() -> None:
    source, target = SequentialModel(specs(), seed=1), SequentialModel(specs(), seed=2)
    target.load_logical_tensors(source.logical_tensors(), where="run")
    for name, tensor in target.logical_tensors().items():
        assert torch.equal(tensor, source.logical_tensors()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed.weight": None}, r"^run: embed\.weight is missing, and the model has \(11, 6\)"),
        ({"embed.weight": torch.zeros(12, 6)}, r"^run: embed\.weight is \(12, 6\), and the model has \(11, 6\)"),
        ({"head.weight": torch.zeros(11, 6)}, r"^run: holds head\.weight, which the model has not"),
    ],
)
def test_tensors_of_another_model_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    model = SequentialModel(specs())
    tensors = {**model.logical_tensors(), **change}
    with pytest.raises(CheckpointError, match=message + "; it belongs to another model$"):
        model.load_logical_tensors({k: v for k, v in tensors.items() if v is not None}, where="run")


class Shared(nn.Module):
    """Two halves with one weight, and a buffer that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def test_a_parameter_that_a_layer_holds_twice_has_its_first_name() -> None:
    source, target = (SequentialModel([LayerSpec(Shared, name="s")], seed=seed) for seed in (1, 2))
    assert list(source.logical_tensors()) == ["s.first.weight", "s.first.bias", "s.second.bias"]
    target.load_logical_tensors(source.logical_tensors(), where="run")
    x = torch.randn(4, 3)
    assert torch.equal(source(x), target(x))
