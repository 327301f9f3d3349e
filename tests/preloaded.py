"""Imports of the server that forks processes for tests, made once for all of them."""

import gc
import warnings
from importlib import import_module

import torch

torch.set_num_threads(1)

MODULES = [
    # Torch and DeepSpeed import these with the first optimizer and the first engine.
    "torch._dynamo",
    "torch.distributed.fsdp",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "einops._torch_specific",
    "numpy.ctypeslib",
    "torch._subclasses.fake_tensor",
    "torch.profiler",
    "pipekit.cli",
    "pipekit.commands.plan",
    "pipekit.commands.train",
    "pipekit.commands.verify",
    "pipekit.engine.initialize",
    "pipekit.engine.load",
    "pipekit.engine.parallel_generator",
    "pipekit.engine.build",
    "pipekit.engine.save",
    "pipekit.inference.export",
    "pipekit.inference.generator",
    # Ranks import these when they start.
    "pipekit.launch.trial",
    "pipekit.training.progress_bar",
    "pipekit.training.run",
    "pipekit.verify.run",
    # Jobs stand in modules of tests, which import these.
    "engine_jobs",
    "gloo_workers",
    "hypothesis",
    "nccl_double",
    "peft",
    "pytest",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "typer.testing",
]

# Said by torch of DeepSpeed's calls, anew for each of them.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_module("pipekit.deepspeed.patches").import_muon_uncompiled()
    for name in MODULES:
        import_module(name)

# It takes two processors a minute to compile, in which all commands that start wait; see `engine_jobs.compiling_adam`.
cpu_adam = import_module("pipekit.deepspeed.cpu_adam")
reason_against_building_adam = cpu_adam._reason_against_building
cpu_adam._reason_against_building = lambda: "the test does not ask for it"  # type: ignore[attr-defined]

# Collections in the forks leave alone what is here now, and so its memory stays shared.
gc.freeze()
