"""What the server that forks processes for tests imports once for all of them."""

import warnings
from importlib import import_module

import torch

torch.set_num_threads(1)

MODULES = [
    # DeepSpeed imports it with the first engine, and it imports most of torch's compiler.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    # These two with the first engine as well.
    "deepspeed.module_inject.auto_ep_layer",
    "einops._torch_specific",
    "pipekit.cli",
    "pipekit.commands.plan",
    "pipekit.commands.train",
    "pipekit.commands.verify",
    "pipekit.engine.initialize",
    "pipekit.engine.load",
    "pipekit.engine.build",
    "pipekit.engine.save",
    "pipekit.inference.export",
    "pipekit.inference.stream_text",
]

# Said by torch of DeepSpeed's calls, anew for each of them.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in MODULES:
        import_module(name)
