"""Description of a difference in words, and the usual cause of one of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipekit.layout import Layout
from pipekit.verify.measurement import Measurement

_SHOWN_NAMES = 4


@dataclass(frozen=True)
class LayoutContext:
    """Layout, stages and layer names of a run in which something differs.

    Attributes:
        layout: the grid of ranks.
        layer_names: logical name of each layer.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        tied: names of the layers that occur more than once.
    """

    layout: Layout
    layer_names: Sequence[str]
    boundaries: Sequence[int]
    tied: frozenset[str]


def describe(fault: Measurement) -> str:
    """Return the differing tensor or number as a phrase.

    Example:
        >>> describe(Measurement("gradient", 0, 1.0, 10.0, layer="embed", tensor="embed.weight"))
        'the gradient of embed.weight, in step 1'
        >>> describe(Measurement("output", 0, 1.0, 10.0, layer="blocks.0.mlp", micro_batch=2))
        'the output of blocks.0.mlp, in step 1, for micro-batch 2'
    """
    place = f"{fault.layer}{fault.tensor}" if fault.kind in ("output", "input gradient") else fault.tensor
    if fault.kind == "initial weights":
        return f"the initial weights of {place}"
    if fault.kind == "weights":
        return f"the weights of {place} after the update of step {fault.step + 1}"
    when = f"in step {fault.step + 1}"
    if fault.layer is None:
        return f"the {fault.kind}, {when}"
    which = f", for micro-batch {fault.micro_batch}" if fault.micro_batch >= 0 else ""
    return f"the {fault.kind} of {place}, {when}{which}"


def quantify(fault: Measurement) -> str:
    """Return the size of a difference in words.

    Example:
        >>> quantify(Measurement("gradient", 0, 1.0, 10.0, layer="head", ratio=2.0, found=0.5, expected=0.25))
        '2 x that of one process'
        >>> quantify(Measurement("loss", 0, 0.5, 5000.0, found=3.0, expected=2.0))
        '3, and 2 in one process: off by 50 %'
    """
    if fault.note:
        return fault.note
    if fault.layer is None:
        return f"{fault.found:.7g}, and {fault.expected:.7g} in one process: off by {_percent(fault.error)}"
    if fault.ratio is not None and abs(fault.ratio) > 1e-6:
        what = "changed by " if fault.kind == "weights" else ""
        return f"{what}{fault.ratio:.4g} x that of one process"
    of_what = "of the change" if fault.kind == "weights" else "of its norm"
    text = f"off by {_percent(fault.error)} {of_what}"
    if fault.found is not None and fault.expected is not None:
        text += (
            f", in {_percent(fault.share)} of its elements: one is {fault.found:.6g}, and {fault.expected:.6g} in one "
            "process"
        )
    return text


def locate(fault: Measurement, context: LayoutContext) -> str:
    """Return the ranks at fault in words; empty where there is only one rank.

    Example:
        >>> context = LayoutContext(Layout(dp=2), ["a"], [0, 1], frozenset())
        >>> locate(Measurement("gradient", 0, 1.0, 9.0, layer="a", ranks=(1,), num_copies=2, num_wrong=1), context)
        'rank 1; 1 of the 2 copies is off'
    """
    if not fault.ranks or context.layout.world_size == 1:
        return ""
    ranks = f"rank{'s' if len(fault.ranks) > 1 else ''} {', '.join(map(str, fault.ranks))}"
    if fault.num_copies == 1:
        return ranks
    if fault.num_wrong == fault.num_copies:
        return f"{ranks}; {'both' if fault.num_copies == 2 else f'all {fault.num_copies}'} copies are off"
    return f"{ranks}; {fault.num_wrong} of the {fault.num_copies} copies {'is' if fault.num_wrong == 1 else 'are'} off"


def likely_cause(fault: Measurement, context: LayoutContext) -> str:
    """Return the usual cause of such a first difference."""
    match fault.kind:
        case "initial weights":
            return (
                f"what {fault.layer} draws in its constructor does not follow from train.seed and its name alone: a "
                "generator of its own, a seed that depends on the rank or the time, numbers drawn when its module was "
                "imported; draw from torch's default generator, which is seeded for each layer"
            )
        case "output":
            return _cause_of_output(fault, context)
        case "loss" if fault.step:
            return (
                f"all that was compared before step {fault.step + 1} agrees; likely other samples in this step, or "
                "something that a layer or the loss keeps from step to step"
            )
        case "loss":
            replicas = ", or the mean over the replicas" if context.layout.dp > 1 else ""
            return (
                "every layer returns what it does in one process; likely the loss function keeps something, draws "
                f"random numbers, or reads its rank; or the labels{replicas} are others"
            )
        case "input gradient":
            return _cause_of_input_gradient(fault, context)
        case "gradient":
            given = "the steps before agree" if fault.step else "all that passes forward and back between layers agrees"
            return f"{given}; {_cause_of_gradient(fault, context)}"
        case "gradient norm":
            return (
                "every gradient agrees; a parameter that several ranks hold is counted more than once in the norm, or "
                "not at all, so that gradients are clipped otherwise"
            )
        case "weights":
            return f"the gradients agree{_cause_of_weights(fault)}"


def _cause_of_output(fault: Measurement, context: LayoutContext) -> str:
    before = context.layer_names[fault.layer_idx - 1] if fault.layer_idx else None
    given = "its weights agree" + (f", and so does what {before} passes to it" if before else "")
    if fault.note:
        return f"{given}; the shape of what it returns depends on the layout"
    if "tensor" in fault.apart:
        return f"{given}; its tensor-parallel ranks return different results, which were not summed or gathered"
    causes = []
    if context.layout.tp > 1:
        causes.append(
            "a sum over the tensor-parallel ranks that is missing or made twice in its forward (RowParallelLinear "
            "makes its own), or a wrong part of a weight"
        )
    causes.append(
        "random numbers that it draws from a generator of its own, in place of torch's default one, which is seeded "
        "for each step, micro-batch and layer"
    )
    if context.layout.dp > 1 or context.layout.pp > 1:
        causes.append("something that it keeps from one micro-batch to the next, or reads from its rank")
    if fault.layer_idx in context.boundaries[1:-1]:
        causes.append("what came over from the stage before")
    return f"{given}; likely {'; or '.join(causes)}"


def _cause_of_input_gradient(fault: Measurement, context: LayoutContext) -> str:
    if fault.layer_idx == len(context.layer_names):
        return "every output agrees, and so does the loss; likely the backward of the loss function"
    likely = (
        "a sum over the tensor-parallel ranks that is missing or made twice there (copy_to_shards makes one in the "
        "backward, ColumnParallelLinear its own)"
        if context.layout.tp > 1
        else "an autograd function, or a hook on gradients, that reads its rank or keeps something"
    )
    crossed = "; or what went back over to the stage before" if fault.layer_idx in context.boundaries[1:-1] else ""
    return (
        f"all outputs agree, and so does what is passed back to {fault.layer}; what its backward makes of that is "
        f"wrong: likely {likely}{crossed}"
    )


def _cause_of_gradient(fault: Measurement, context: LayoutContext) -> str:
    if "data" in fault.apart:
        return "the replicas hold different gradients: they were not averaged over parallel.dp"
    if "pipe" in fault.apart:
        return "its stages hold different gradients of it: they were not summed over the stages that share it"
    if "tensor" in fault.apart:
        return (
            "the tensor-parallel ranks hold different gradients of it: each applied it to a part of the sequence or "
            "of the heads, and they were not summed (mark_partial_gradient)"
        )
    is_tied = fault.layer in context.tied
    if fault.ratio is not None and fault.ratio > 0:
        factor, divisor = round(fault.ratio), round(1 / fault.ratio)
        if factor >= 2 and abs(fault.ratio - factor) < 0.02:
            times = "twice" if factor == 2 else f"{factor} times"
            tied = f": {fault.layer} is tied, and the gradients of its copies are summed twice"
            return f"it is counted {times}{tied if is_tied else _degree_hint(factor, context)}"
        if abs(1 / fault.ratio - divisor) < 0.02:
            return f"it is divided by {divisor}, or so much of it is not counted{_degree_hint(divisor, context)}"
    if is_tied:
        return f"{fault.layer} is tied, and what its copies add to the gradient is not summed, or summed more than once"
    if fault.step:
        return "likely gradients of the step before were not cleared, or this step has other samples"
    return (
        "likely a hook on the parameter, a weight gradient that is computed from a part of the inputs, or a reduction "
        "that is missing or made twice"
    )


def _cause_of_weights(fault: Measurement) -> str:
    if "data" in fault.apart:
        return "; the replicas have made different updates, or hold stale weights"
    if "pipe" in fault.apart:
        return "; the stages that share it have made different updates"
    if fault.ratio is not None:
        return (
            "; likely a learning rate, or a limit of the gradient's norm, that depends on the rank or on the number of "
            "ranks"
        )
    return (
        ", and the optimizer makes other weights of them in one process; likely an optimizer whose update of an "
        "element depends on other elements (of a rank's own part, or of the stage's list of parameters), or settings "
        "that differ by rank"
    )


def _degree_hint(factor: int, context: LayoutContext) -> str:
    axes = [name for name in ("pp", "dp", "tp") if getattr(context.layout, name) == factor > 1]
    return f" (parallel.{axes[0]} is {factor})" if len(axes) == 1 else ""


def _percent(share: float) -> str:
    return "more than can be said" if share == float("inf") else f"{100 * share:.3g} %"


def show_names(names: Sequence[str]) -> str:
    """Return some names, and how many more there are.

    Example:
        >>> show_names(["a", "b", "c", "d", "e", "f"])
        'a, b, c, d and 2 more'
    """
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")
