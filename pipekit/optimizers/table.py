"""Table of the optimizers that a configuration can name: their classes, settings and states.

To add one, add an entry to `OPTIMIZERS`. The table is pure, so that a configuration is checked without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

SECTION_KEYS = ("betas", "eps", "weight_decay", "momentum")
"""Keys of the `optimizer` section that not every optimizer takes."""


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        path: its class, as `module:name`.
        source: paper, or the reference that it follows.
        settings: keys of the `optimizer` section that it takes, with their defaults.
        states: its states that have a number for each weight.
        setting_states: further ones, each there where an argument of the class, or a key of the section, is not 0.
        vector_states: those of weights that are no matrices, where these are others.
        tensor_states: its states that have one number for each tensor.
        options: arguments of the class that are given unless `optimizer.args` says otherwise.
        sums_over_tensors: True if the update of a weight depends on others of the same tensor; then the ranks that
            hold shards of one work together.
        refusal: the reason why it cannot be used.
    """

    path: str
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    states: tuple[str, ...] = ()
    setting_states: Mapping[str, str] = field(default_factory=dict)
    vector_states: tuple[str, ...] | None = None
    tensor_states: tuple[str, ...] = ("step",)
    options: Mapping[str, Any] = field(default_factory=dict)
    sums_over_tensors: bool = False
    refusal: str = ""

    def count_states(self, settings: Mapping[str, Any]) -> int:
        """Numbers for each weight, under some settings."""
        return len(self.states) + sum(1 for setting in self.setting_states if settings.get(setting))


_ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
_ADAM_STATES = ("exp_avg", "exp_avg_sq")
_AMSGRAD = {"amsgrad": "max_exp_avg_sq"}
_TORCH = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(
        "torch.optim:AdamW",
        "Loshchilov and Hutter, Decoupled Weight Decay Regularization",
        _ADAM,
        _ADAM_STATES,
        _AMSGRAD,
        options={"fused": True},
    ),
    "adam": OptimizerKind(
        "torch.optim:Adam",
        "Kingma and Ba, Adam: A Method for Stochastic Optimization",
        _ADAM,
        _ADAM_STATES,
        _AMSGRAD,
        options={"fused": True},
    ),
    "sgd": OptimizerKind(
        "torch.optim:SGD",
        "Sutskever et al., On the Importance of Initialization and Momentum in Deep Learning",
        {"momentum": 0.0, "weight_decay": 0.1},
        setting_states={"momentum": "momentum_buffer"},
        tensor_states=(),
    ),
    "adadelta": OptimizerKind(
        "torch.optim:Adadelta",
        "Zeiler, ADADELTA: An Adaptive Learning Rate Method",
        {"eps": 1e-6, "weight_decay": 0.0},
        ("square_avg", "acc_delta"),
    ),
    "adagrad": OptimizerKind(
        "pipekit.optimizers.adagrad:Adagrad",
        "Duchi et al., Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
        {"eps": 1e-10, "weight_decay": 0.0},
        ("sum",),
    ),
    "adamax": OptimizerKind(
        "torch.optim:Adamax",
        "Kingma and Ba, Adam, section 7.1",
        _TORCH,
        ("exp_avg", "exp_inf"),
    ),
    "asgd": OptimizerKind(
        "torch.optim:ASGD",
        "Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging",
        {"weight_decay": 0.0},
        ("ax",),
        tensor_states=("eta", "mu", "step"),
    ),
    "lamb": OptimizerKind(
        "pipekit.optimizers.lamb:Lamb",
        "You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, algorithm 2",
        {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01},
        _ADAM_STATES,
        sums_over_tensors=True,
    ),
    "lion": OptimizerKind(
        "pipekit.optimizers.lion:Lion",
        "Chen et al., Symbolic Discovery of Optimization Algorithms, program 1",
        {"betas": (0.9, 0.99), "weight_decay": 0.1},
        ("exp_avg",),
        tensor_states=(),
    ),
    "muon": OptimizerKind(
        "pipekit.optimizers.muon:MatricesAndVectors",
        "Jordan et al., Muon: An optimizer for hidden layers in neural networks, as torch.optim.Muon",
        {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95, "weight_decay": 0.1},
        ("momentum_buffer",),
        vector_states=_ADAM_STATES,
        sums_over_tensors=True,
    ),
    "nadam": OptimizerKind(
        "torch.optim:NAdam",
        "Dozat, Incorporating Nesterov Momentum into Adam",
        _TORCH,
        _ADAM_STATES,
        tensor_states=("mu_product", "step"),
    ),
    "radam": OptimizerKind(
        "torch.optim:RAdam",
        "Liu et al., On the Variance of the Adaptive Learning Rate and Beyond",
        _TORCH,
        _ADAM_STATES,
    ),
    "rmsprop": OptimizerKind(
        "torch.optim:RMSprop",
        "Tieleman and Hinton, Lecture 6.5, and Graves, Generating Sequences With Recurrent Neural Networks",
        {"eps": 1e-8, "momentum": 0.0, "weight_decay": 0.0},
        ("square_avg",),
        {"momentum": "momentum_buffer", "centered": "grad_avg"},
    ),
    "rprop": OptimizerKind(
        "torch.optim:Rprop",
        "Riedmiller and Braun, A Direct Adaptive Method for Faster Backpropagation Learning",
        {},
        ("prev", "step_size"),
    ),
    "adafactor": OptimizerKind(
        "torch.optim:Adafactor",
        "Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
        refusal="it keeps sums over rows and columns of whole matrices, but ranks and checkpoints hold parts; "
        "try optimizer.type=lion, which keeps one number for each weight",
    ),
    "lbfgs": OptimizerKind(
        "torch.optim:LBFGS",
        "Nocedal and Wright, Numerical Optimization, chapter 7",
        refusal="it computes the loss again within an update, by a closure, which a pipeline does not have; "
        "try optimizer.type=adamw",
    ),
    "sparseadam": OptimizerKind(
        "torch.optim:SparseAdam",
        "torch.optim.SparseAdam",
        refusal="it takes sparse gradients, but gradients here are dense; try optimizer.type=adam",
    ),
}
"""Every optimizer by its name in a configuration."""

_ALIASES = {
    "fusedadam": "adamw",
    "cpuadam": "adamw",
    "deepspeedcpuadam": "adamw",
    "fusedlamb": "lamb",
    "fusedlion": "lion",
    "cpulion": "lion",
    "deepspeedcpulion": "lion",
    "cpuadagrad": "adagrad",
    "deepspeedcpuadagrad": "adagrad",
}
"""Names of the classes of DeepSpeed, and where they are made here: under `parallel.offload` adamw is its CPU Adam."""

NOT_THERE: dict[str, str] = {
    **dict.fromkeys(
        ("onebitadam", "zerooneadam"),
        "DeepSpeed 0.19 has no optimizers any more that compress gradients to one bit; try optimizer.type=adamw",
    ),
    "onebitlamb": "DeepSpeed 0.19 has no optimizers any more that compress gradients to one bit; try "
    "optimizer.type=lamb",
    **dict.fromkeys(
        ("muadam", "muadamw", "musgd"),
        "maximal update parametrization is not available; try optimizer.type=adamw with optimizer.groups",
    ),
}
"""Names of DeepSpeed's JSON that lead nowhere, and why."""


def optimizer_name(text: str) -> str | None:
    """Name of an optimizer that is written as here, as torch's class or as DeepSpeed's; None if there is none.

    Example:
        >>> [optimizer_name(text) for text in ("torch.optim.NAdam", "FusedLamb", "AdamW", "adamx")]
        ['nadam', 'lamb', 'adamw', None]
    """
    plain = text.removeprefix("torch.optim.").lower()
    name = _ALIASES.get(plain, plain)
    return name if name in OPTIMIZERS else None


def optimizer_section(deepspeed_section: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizer section that makes the updates of the `optimizer` section of DeepSpeed's JSON, whose type is known.

    Example:
        >>> optimizer_section({"type": "Adam", "params": {"lr": 1e-3, "adam_w_mode": False, "weight_decay": 0.01}})
        {'type': 'adam', 'lr': 0.001, 'weight_decay': 0.01, 'betas': (0.9, 0.999)}
        >>> optimizer_section({"type": "Lamb", "params": {"max_coeff": 5.0}})
        {'type': 'lamb', 'lr': 0.001, 'weight_decay': 0.0, 'args': {'max_coeff': 5.0}}
    """
    name = optimizer_name(deepspeed_section["type"]) or deepspeed_section["type"]
    params = dict(deepspeed_section.get("params") or {})
    section: dict[str, Any] = {"type": name, "lr": 1e-3, "weight_decay": 0.0}
    if name in ("adam", "adamw"):
        # DeepSpeed's Adam is AdamW unless it is told otherwise; whose code makes the updates is the device's matter.
        decouples = params.pop("adam_w_mode", True) or section["type"] == "adamw"
        params.pop("torch_adam", None)
        section |= {"type": "adamw" if decouples else name, "betas": (0.9, 0.999)}
    if params.get("bias_correction") is True:
        del params["bias_correction"]
    for key in [key for key in params if key in ("lr", *SECTION_KEYS)]:
        value = params.pop(key)
        section[key] = tuple(value) if isinstance(value, list) else value
    return section | ({"args": params} if params else {})


def set_rates(param_groups: Iterable[MutableMapping[str, Any]], lr: float, momentum: float | None = None) -> None:
    """Set the learning rate of parameter groups, each times its `lr_scale`, and their momentum where one is given.

    Example:
        >>> groups = [{"lr": 1.0, "lr_scale": 0.5, "betas": (0.9, 0.99)}]
        >>> set_rates(groups, 0.2, momentum=0.8)
        >>> groups
        [{'lr': 0.1, 'lr_scale': 0.5, 'betas': (0.8, 0.99)}]
    """
    for group in param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif momentum is not None and "momentum" in group:
            group["momentum"] = momentum
