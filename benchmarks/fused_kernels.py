"""Fused kernels of torch, measured: each against its composition of simple operations, and a compiled block of a model.

    python benchmarks/fused_kernels.py [--device cuda] [--batch 2] [--tokens 512] [--hidden-size 512] [--out FILE]

Forward and backward of what the built-in models compute with: norms, attention, cross-entropy, and head and loss
together by `torch.nn.functional`, rotary positions and a block by `torch.compile`. The fused and the unfused function
take turns on the same tensors, so that both see the same machine; medians are shown. First it checks that the two
agree. Prints a table, and writes JSON with `--out`. On two cores it takes about two minutes, most of them to compile.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pipekit.layers.specs import LayerSpec, build_layer
from pipekit.models.llama import LlamaConfig
from pipekit.models.transformer.rotary import Rotary

HEAD_SIZE, EPS = 64, 1e-5
WARM_UP = 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Pair:
    """A fused function, the unfused one that it stands for, and their arguments."""

    name: str
    by: str
    fused: Function
    unfused: Function
    arguments: tuple[Tensor, ...]


@dataclass(frozen=True)
class Measured:
    """Medians of one pair."""

    name: str
    by: str
    fused_s: float
    unfused_s: float
    ratio: float


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm of simple operations."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight + bias


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm of simple operations."""
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with a matrix of all scores."""
    length = q.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(2, 3) * HEAD_SIZE**-0.5).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of simple operations."""
    return (scores.logsumexp(-1) - scores.gather(1, labels.unsqueeze(1)).squeeze(1)).mean()


def head_and_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Head, and the mean cross-entropy of its scores."""
    return cross_entropy(F.linear(x, weight), labels)


def compiled(function: Callable[..., Tensor]) -> Function:
    """Function that torch compiles for fixed shapes."""
    return torch.compile(function, dynamic=False)  # type: ignore[no-any-return]


def block_of(specs: list[LayerSpec]) -> nn.Module:
    """The two halves of the first block of a model."""
    chosen = [spec for spec in specs if spec.name is not None and spec.name.startswith("blocks.0.")]
    return nn.Sequential(*(build_layer(spec, name=str(spec.name), seed=1) for spec in chosen))


def pairs(arguments: argparse.Namespace) -> Iterator[Pair]:
    """Each fused function with its counterpart."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    batch, tokens, width, vocabulary = arguments.batch, arguments.tokens, arguments.hidden_size, arguments.vocab_size
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    x, weight, bias = draw(batch, tokens, width), draw(width), draw(width)
    q, k, v = (draw(batch, width // HEAD_SIZE, tokens, HEAD_SIZE) for _ in range(3))
    labels = torch.randint(vocabulary, (batch * tokens,), generator=generator).to(device)
    scores, head = draw(batch * tokens, vocabulary), draw(vocabulary, width, scale=width**-0.5)
    rotary = Rotary(HEAD_SIZE)

    def rotate(q: Tensor, k: Tensor) -> Tensor:
        return torch.stack(rotary.rotate(q, k))

    model = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_layers=1, num_heads=width // HEAD_SIZE, max_positions=tokens
    )
    block = block_of(model.layer_specs(loss_chunk_tokens=None)).to(device, dtype)
    yield Pair("layer norm", "layer_norm", lambda *a: F.layer_norm(a[0], (width,), *a[1:], EPS), layer_norm,
               (x, weight, bias))  # fmt: skip
    yield Pair("RMS norm", "rms_norm", lambda *a: F.rms_norm(a[0], (width,), a[1], EPS), rms_norm, (x, weight))
    yield Pair("causal attention", "scaled_dot_product_attention",
               lambda *a: F.scaled_dot_product_attention(*a, is_causal=True), attention, (q, k, v))  # fmt: skip
    yield Pair("cross-entropy", "cross_entropy", F.cross_entropy, cross_entropy, (scores, labels))
    yield Pair("head and loss", "linear_cross_entropy", F.linear_cross_entropy, head_and_loss,
               (x.detach().flatten(0, 1).requires_grad_(), head, labels))  # fmt: skip
    yield Pair("rotary positions", "compile", compiled(rotate), rotate, (q, k))
    yield Pair("block of Llama", "compile", compiled(block.forward), block, (x,))


def forward_and_backward(function: Function, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """Result of a function, and the gradients of its arguments."""
    result = function(*arguments)
    wanted = [argument for argument in arguments if argument.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, wanted, torch.ones_like(result))]


def measure(pair: Pair, repeats: int) -> Measured:
    """Medians of the two functions of a pair, in turns.

    Raises:
        SystemExit: if their results or gradients differ.
    """
    results = [forward_and_backward(function, pair.arguments) for function in (pair.fused, pair.unfused)]
    for ours, theirs in zip(*results, strict=True):
        error = float((ours - theirs).float().norm() / theirs.float().norm())
        if error > TOLERANCE[ours.dtype]:
            raise SystemExit(f"{pair.name}: the fused result differs from the unfused one by {error:.1e}")
    del results
    is_gpu = pair.arguments[0].is_cuda
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM_UP + repeats):
        for times_s, function in zip(seconds, (pair.fused, pair.unfused), strict=True):
            started_s = time.perf_counter()
            forward_and_backward(function, pair.arguments)
            if is_gpu:
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - started_s)
    fused_s, unfused_s = (statistics.median(times_s[WARM_UP:]) for times_s in seconds)
    return Measured(pair.name, pair.by, fused_s, unfused_s, unfused_s / fused_s)


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    found = [measure(pair, arguments.repeats) for pair in pairs(arguments)]
    table = Table("", "fused by", "unfused", "fused", "unfused / fused")
    for each in found:
        times = [f"{1e3 * seconds:.2f} ms" for seconds in (each.unfused_s, each.fused_s)]
        table.add_row(each.name, each.by, *times, f"{each.ratio:.2f}")
    Console(width=100).print(table)
    if arguments.out is not None:
        machine = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "cpu"
        options = {key: value for key, value in vars(arguments).items() if key != "out"}
        content = {
            "machine": machine,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **options,
            "kernels": [asdict(each) for each in found],
        }
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
