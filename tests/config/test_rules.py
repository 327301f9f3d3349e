"""Values that contradict each other are refused with the numbers and what to type instead."""

from __future__ import annotations

from typing import Any

import pytest

from pipekit.config import parse_config
from pipekit.errors import ConfigError

BASE: dict[str, Any] = {"model": {"preset": "tiny"}, "train": {"steps": 300}}

BROKEN = {
    ("parallel.tp=4", "parallel.dp=30000", "train.global_batch_size=30000"): (
        "parallel.pp=1 x parallel.tp=4 x parallel.dp=30000 are 120,000 processes, and no run has had more than "
        "100,000; lower one of them"
    ),
    ("parallel.pp=2", "train.global_batch_size=500001"): (
        "train.global_batch_size=500001 with train.micro_batch_size=1 makes 500,001 micro-batches of a step, each of "
        "which passes 2 stages, and more than 1,000,000 such actions are not planned; raise train.micro_batch_size"
    ),
    ("train.sequence_length=300",): (
        "train.sequence_length=300 is longer than model.max_positions=256; "
        "try train.sequence_length=256, or model.max_positions=300"
    ),
    ("parallel.tp=3", "train.sequence_length=96"): (
        "parallel.tp=3 does not divide model.num_heads=4, and a rank computes whole heads; try parallel.tp=1 or 2"
    ),
    ("parallel.tp=4", "model.num_heads=12", "model.hidden_size=96", "model.num_kv_heads=6"): (
        "parallel.tp=4 and model.num_kv_heads=6: one must divide the other; try parallel.tp=1, 2 or 3"
    ),
    ("parallel.tp=4", "train.sequence_length=66"): (
        "parallel.tp=4 does not divide train.sequence_length=66, and sequence parallelism cuts every sequence into "
        "equal parts; try train.sequence_length=64 or 68, or parallel.sequence_parallel=false"
    ),
    ("parallel.tp=2", "parallel.zero=3"): (
        "parallel.zero=3 does not go with parallel.tp=2 for a built-in model, whose loss needs the head's weights "
        "after ZeRO-3 has freed them; try parallel.zero=2"
    ),
    ("train.compile=true", "model.sparse_attention={mode: fixed}"): "block by block; try train.compile=false",
    ("train.compile=true", "parallel.zero=3"): "in hooks that cannot be compiled; try parallel.zero=2",
    ("train.loss_chunk_tokens=100", "parallel.zero=3"): "try train.loss_chunk_tokens=null, or parallel.zero=2",
    ("model.num_kv_heads=3",): "model.num_kv_heads=3 does not divide model.num_heads=4; try 1, 2 or 4",
    ("parallel.order=[pipe,data,data]",): (
        "parallel.order=[pipe, data, data]: must name each axis once, the outermost first; for example "
        "[pipe, data, tensor]"
    ),
    ("parallel.order=[pipe,data,model]",): (
        "parallel.order=[pipe, data, model]: must be a list of 3, each pipe, data or tensor; for example order: "
        "[pipe, data, tensor]"
    ),
    ("parallel.order=[tensor,data,pipe]", "parallel.auto=true"): (
        "parallel.order=[tensor, data, pipe] does not go with parallel.auto=true, which chooses it; remove one of them"
    ),
    ("parallel.zero=2", "parallel.pp=2"): (
        "parallel.zero=2 does not go with parallel.pp=2: it shards gradients after every micro-batch, and a "
        "pipeline adds them up over all of them; try parallel.zero=1, or parallel.pp=1 with parallel.zero=2"
    ),
    ("parallel.zero=3", "parallel.schedule=gpipe"): (
        "parallel.schedule=gpipe does not go with parallel.zero=3, which takes each micro-batch forward and back at "
        "once; try parallel.schedule=1f1b, or parallel.zero=1"
    ),
    ("parallel.zero=2", "parallel.schedule=zb-h1"): "try parallel.schedule=1f1b, or parallel.zero=1",
    ("parallel.zero=2", "parallel.schedule=interleaved-1f1b"): "try parallel.schedule=1f1b, or parallel.zero=1",
    ("train.activation_checkpointing={partition: true}",): (
        "train.activation_checkpointing.partition=true shares inputs out over tensor-parallel ranks, and "
        "parallel.tp=1; try parallel.tp=2, or remove it"
    ),
    ("train.activation_checkpointing={partition: true}", "parallel.tp=2"): (
        "has nothing to do under parallel.sequence_parallel=true, where each tensor-parallel rank has its shard of "
        "the inputs already; remove it, or set parallel.sequence_parallel=false"
    ),
    ("parallel.offload=optimizer", "parallel.zero=0"): (
        "parallel.offload=optimizer does not go with parallel.zero=0: what ZeRO manages can be moved to host "
        "memory or files, and 0 manages nothing; try parallel.zero=1"
    ),
    ("parallel.offload=parameters", "parallel.zero=0", "parallel.pp=2"): (
        "and 0 manages nothing; try parallel.offload=optimizer with parallel.zero=1"
    ),
    ("parallel.offload=parameters", "parallel.zero=2"): (
        "parallel.offload=parameters does not go with parallel.zero=2, which keeps every weight on its device; try "
        "parallel.offload=optimizer, or parallel.zero=3"
    ),
    ("parallel.offload=parameters", "parallel.pp=2"): (
        "parallel.offload=parameters does not go with parallel.zero=1, which keeps every weight on its device; try "
        "parallel.offload=optimizer"
    ),
    ("parallel.offload=nvme",): (
        "parallel.offload=nvme needs a folder for its files; set parallel.nvme_dir to one on a local disk"
    ),
    ("parallel.nvme_dir=/nvme", "parallel.offload=optimizer"): (
        "parallel.nvme_dir has no effect with parallel.offload=optimizer; remove it, or set parallel.offload=nvme"
    ),
    ("parallel.offload=nvme", "parallel.nvme_dir=/nvme", "optimizer.type=lamb"): (
        "parallel.offload=nvme does not go with optimizer.type=lamb, which updates whole tensors; try "
        "parallel.offload=optimizer, or optimizer.type=adamw"
    ),
    ("parallel.offload=optimizer", "parallel.auto=true"): (
        "parallel.offload=optimizer does not go with parallel.auto=true, whose choice keeps everything on the devices; "
        "remove one of them"
    ),
    ("deepspeed.zero_optimization.offload_optimizer={pin_memory: true}",): (
        "has no effect with parallel.offload=none; remove it, or set "
        "parallel.offload=optimizer"
    ),
    ("deepspeed.zero_optimization.offload_param={pin_memory: true}", "parallel.offload=optimizer"): (
        "has no effect with parallel.offload=optimizer; remove it, or set "
        "parallel.offload=parameters"
    ),
    ("deepspeed.zero_optimization.stage3_max_live_parameters=1000",): (
        "has no effect with parallel.zero=1; remove it, or set "
        "parallel.zero=3"
    ),
    ("parallel.pp=13",): (
        "parallel.pp=13 stages are more than the model's 12 layers (2 for each of model.num_layers=4, "
        "and 4 more); try parallel.pp=12 or less"
    ),
    ("parallel.partition=manual", "parallel.pp=2"): (
        "parallel.partition=manual needs parallel.boundaries, where the stages begin and end; "
        "for example parallel.boundaries=[0, 6, 12]"
    ),
    ("parallel.pp=2", "parallel.boundaries=[0,6,12]"): (
        "parallel.boundaries=[0, 6, 12] is only for parallel.partition=manual, and it is parameters; "
        "remove it, or set parallel.partition=manual"
    ),
    ("parallel.partition=manual", "parallel.boundaries=[0,6,12]"): (
        "parallel.boundaries=[0, 6, 12] must have 2 entries, one more than parallel.pp=1, and has 3; "
        "for example parallel.boundaries=[0, 12]"
    ),
    ("parallel.partition=manual", "parallel.pp=2", "parallel.boundaries=[1,6,12]"): (
        "parallel.boundaries=[1, 6, 12] must start with 0, and starts with 1; "
        "for example parallel.boundaries=[0, 6, 12]"
    ),
    ("parallel.partition=manual", "parallel.pp=2", "parallel.boundaries=[0,12,12]"): (
        "parallel.boundaries=[0, 12, 12] must grow from entry to entry, since every stage needs a layer; "
        "for example parallel.boundaries=[0, 6, 12]"
    ),
    ("parallel.partition=manual", "parallel.pp=2", "parallel.boundaries=[0,6,13]"): (
        "parallel.boundaries=[0, 6, 13] must end with 12, the number of layers, and ends with 13; "
        "for example parallel.boundaries=[0, 6, 12]"
    ),
    ("parallel.partition=manual", "parallel.pp=2", "parallel.boundaries=Et|t*2|tL"): (
        "parallel.boundaries=Et|t*2|tL must have 2 stages, one for each of parallel.pp=2, and has 3; "
        "for example parallel.boundaries=[0, 6, 12]"
    ),
    ("parallel.pp=2", "parallel.boundaries=Et*2|t*2L"): (
        "parallel.boundaries=Et*2|t*2L is only for parallel.partition=manual, and it is parameters; "
        "remove it, or set parallel.partition=manual"
    ),
    ("parallel.partition=manual", "parallel.pp=2", "parallel.boundaries=Et*2|(t*2L"): (
        "parallel.boundaries=Et*2|(t*2L: at position 6 ((): there is no ) to this ("
    ),
    ("train.micro_batch_size=3",): (
        "train.global_batch_size=8 is not a multiple of train.micro_batch_size=3; "
        "try train.global_batch_size=6 or 9, or train.micro_batch_size=2"
    ),
    ("train.micro_batch_size=4", "parallel.dp=4"): (
        "train.global_batch_size=8 is not a multiple of train.micro_batch_size=4 x dp=4, which is 16; "
        "try train.global_batch_size=16, or train.micro_batch_size=2"
    ),
    ("parallel.dp=3",): (
        "train.global_batch_size=8 is not a multiple of train.micro_batch_size=1 x dp=3, which is 3; "
        "try train.global_batch_size=6 or 9"
    ),
    ("scheduler.warmup_steps=101", "scheduler.decay_steps=100"): (
        "scheduler.warmup_steps=101 is more than scheduler.decay_steps=100; try scheduler.warmup_steps=10"
    ),
    ("lora.dropout=0.1",): (
        "lora.dropout=0.1: has no effect with lora.rank=null; remove it, or set lora.rank=16"
    ),
    ("lora.targets=[q_proj]",): (
        "lora.targets=[q_proj]: has no effect with lora.rank=null; remove it, or set lora.rank=16"
    ),
    ("lora.rank=4", "lora.base=runs/own", "model.init_from=downloads/gpt2"): (
        "lora.base=runs/own and model.init_from=downloads/gpt2 both give the weights that stay as they are; leave one "
        "of them out"
    ),
    ("optimizer.type=lion", "optimizer.eps=1.0e-6"): (
        "optimizer.eps=1e-06 is no setting of optimizer.type=lion; it takes betas and weight_decay"
    ),
    ("optimizer.type=torch.optim.LBFGS",): (
        "optimizer.type=lbfgs: it computes the loss again within an update, by a closure, which a pipeline does not "
        "have; try optimizer.type=adamw"
    ),
    ("optimizer.groups=[{match: 'embed*', algorithm: adamw}]",): (
        "optimizer.groups.0.algorithm=adamw is for optimizer.type=muon, and it is adamw; remove it"
    ),
    ("optimizer.groups=[{match: 'embed*', momentum: 0.5}]",): (
        "optimizer.groups.0.momentum=0.5 is no setting of optimizer.type=adamw; "
        "try optimizer.groups.0.betas=[0.5, 0.95]"
    ),
    ("optimizer.args={lr: 0.1}",): "lr has a key of its own; write it as optimizer.lr",
    ("scheduler.type=wsd", "scheduler.args={cooldown_stps: 3}"): (
        "wsd: cooldown_stps is no argument of this schedule; did you mean cooldown_steps?"
    ),
    ("scheduler.type=LRRangeTest", "scheduler.warmup_steps=5"): (
        "scheduler.warmup_steps=5 has no effect with scheduler.type=lr_range_test; remove it"
    ),
    ("scheduler.warmup_steps=5", "scheduler.warmup_tokens=1000"): (
        "scheduler.warmup_tokens=1000 and scheduler.warmup_steps=5 both give one length; leave one of them out"
    ),
    ("scheduler.warmup_tokens=1000000", "scheduler.decay_tokens=1000"): "takes 977 steps, more than the 1 of the decay",
    ("optimizer.momentum=0.9",): (
        "optimizer.momentum=0.9 is no setting of optimizer.type=adamw; "
        "try optimizer.betas=[0.9, 0.95]"
    ),
    ("train.eval_interval=5", "data.validation_fraction=0"): (
        "train.eval_interval=5 needs text to evaluate on, and data.validation_fraction=0 holds none out; "
        "try data.validation_fraction=0.05, or train.eval_interval=null"
    ),
    ("train.eval_interval=null", "callbacks.early_stopping=true"): (
        "callbacks.early_stopping needs evaluations, and train.eval_interval=null makes none; try "
        "train.eval_interval=100"
    ),
}  # fmt: skip


@pytest.mark.parametrize("overrides", BROKEN, ids=" ".join)
def test_a_broken_rule_says_what_to_type(overrides: tuple[str, ...]):
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE, overrides)
    text = str(caught.value)
    assert BROKEN[overrides] in text
    assert text.count("\n") == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.sequence_length=256",),
        ("parallel.pp=12",),
        ("parallel.order=[tensor,data,pipe]", "parallel.pp=2"),
        ("parallel.order=[pipe,data,tensor]", "parallel.auto=true"),
        ("parallel.zero=0", "parallel.pp=2"),
        ("parallel.zero=2",),
        ("parallel.zero=3", "parallel.stages_per_rank=1"),
        ("parallel.zero=1", "parallel.pp=2", "parallel.offload=optimizer"),
        ("parallel.zero=3", "parallel.offload=parameters", "deepspeed.zero_optimization.stage3_max_live_parameters=9"),
        ("parallel.partition=manual", "parallel.pp=2", "parallel.boundaries=[0,1,12]"),
        ("parallel.partition=type:Attention|MLP",),
        ("parallel.partition=manual", "parallel.pp=2", "parallel.boundaries=Et*2|t*2L"),
        ("parallel.partition=memory", "parallel.pp=2"),
        ("train.micro_batch_size=2", "parallel.dp=4"),
        ("scheduler.warmup_steps=301",),
        ("optimizer.type=sgd", "optimizer.momentum=0.9"),
        ("optimizer.type=FusedLamb", "optimizer.args={max_coeff: 10.0}"),
        ("optimizer.type=my_package.MyOptimizer", "optimizer.betas=[0.5, 0.9]"),
        ("scheduler.type=WarmupDecayLR", "scheduler.args={warmup_num_steps: 10}"),
        ("scheduler.warmup_tokens=1024", "scheduler.decay_steps=1"),
        ("data.validation_fraction=0",),
        ("train.eval_interval=5", "callbacks.early_stopping={patience: 2}"),
    ],
    ids=" ".join,
)
def test_the_edge_of_a_rule_is_allowed(overrides: tuple[str, ...]):
    parse_config(BASE, overrides)


def test_the_number_of_layers_of_a_users_model_is_not_guessed():
    own = {"model": "a.b:c", "train": {"steps": 3}}
    parse_config(own, ["parallel.pp=40", "train.sequence_length=9999"])
    parse_config(own, ["parallel.partition=manual", "parallel.pp=2", "parallel.boundaries=[0,3,5]"])
    with pytest.raises(ConfigError, match=r"for example parallel.boundaries=\[0, 6, 12\] for parallel.pp=2"):
        parse_config(own, ["parallel.partition=manual"])


@pytest.mark.parametrize("pp", range(1, 13))
def test_suggested_boundaries_are_accepted(pp: int):
    boundaries = [stage * 12 // pp for stage in range(pp + 1)]
    parse_config(BASE, ["parallel.partition=manual", f"parallel.pp={pp}", f"parallel.boundaries={boundaries}"])
