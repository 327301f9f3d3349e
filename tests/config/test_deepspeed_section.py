"""DeepSpeed's keys give pipekit's their values, or agree with them; else one error names both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipekit.config import load_config, parse_config
from pipekit.config.deepspeed_keys import TREATMENTS
from pipekit.config.deepspeed_section import fill_auto
from pipekit.errors import ConfigError
from pipekit.settings.activations import ActivationCheckpointing

BASE: dict[str, Any] = {"model": {"preset": "tiny"}, "train": {"steps": 3}}

HONOURED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "train_batch_size": ({"train_batch_size": 16}, {"train.global_batch_size": 16}),
    "train_micro_batch_size_per_gpu": ({"train_micro_batch_size_per_gpu": 2}, {"train.micro_batch_size": 2}),
    "gradient_accumulation_steps": (
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
        {"train.global_batch_size": 16, "train.micro_batch_size": 2, "parallel.dp": 2},
    ),
    "optimizer": (
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.99], "torch_adam": True}}},
        {"optimizer.type": "adamw", "optimizer.lr": 1e-4, "optimizer.betas": (0.9, 0.99), "optimizer.eps": 1e-8},
    ),
    "scheduler": (
        {
            "optimizer": {"type": "Lamb", "params": {"lr": 2e-3, "max_coeff": 5.0}},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"total_num_steps": "auto", "warmup_num_steps": 1, "warmup_max_lr": "auto"},
            },
        },
        {
            "optimizer.type": "lamb",
            "optimizer.args": {"max_coeff": 5.0},
            "scheduler.type": "warmup_decay_lr",
            "scheduler.args": {"total_num_steps": 3, "warmup_num_steps": 1, "warmup_max_lr": 2e-3},
        },
    ),
    "gradient_clipping": ({"gradient_clipping": 0.5}, {"train.gradient_clipping": 0.5}),
    "data_efficiency": (
        {
            "data_efficiency": {
                "enabled": True,
                "data_sampling": {
                    "enabled": True,
                    "curriculum_learning": {
                        "enabled": True,
                        "curriculum_metrics": {
                            "seqlen": {
                                "difficulty_type": "value",
                                "min_difficulty": 32,
                                "max_difficulty": 128,
                                "schedule_type": "fixed_discrete",
                                "schedule_config": {"difficulty": [32, 64, 128], "max_step": [10, 20]},
                            }
                        },
                    },
                },
            }
        },
        {
            "train.curriculum.type": "discrete",
            "train.curriculum.difficulty": (32, 64, 128),
            "train.curriculum.max_step": (10, 20),
            "train.curriculum.min_difficulty": None,
        },
    ),
    "curriculum_learning": (
        {
            "curriculum_learning": {
                "enabled": True,
                "curriculum_type": "seqlen",
                "min_difficulty": 32,
                "max_difficulty": 128,
                "schedule_type": "fixed_root",
                "schedule_config": {"total_curriculum_step": 100, "difficulty_step": 8, "root_degree": 2},
            }
        },
        {
            "train.curriculum.type": "root",
            "train.curriculum.min_difficulty": 32,
            "train.curriculum.max_difficulty": 128,
            "train.curriculum.total_curriculum_step": 100,
            "train.curriculum.difficulty_step": 8,
            "train.curriculum.root_degree": 2,
        },
    ),
    "progressive_layer_drop": (
        {"progressive_layer_drop": {"enabled": True, "theta": 0.4}},
        {"train.layer_drop.theta": 0.4, "train.layer_drop.gamma": 0.001},
    ),
    "steps_per_print": ({"steps_per_print": 2000}, {"logging.interval": 2000}),
    "pipeline.stages": ({"pipeline": {"stages": 2}}, {"parallel.pp": 2}),
    "pipeline.partition": ({"pipeline": {"partition": "uniform"}}, {"parallel.partition": "uniform"}),
    "pipeline.activation_checkpoint_interval": (
        {"pipeline": {"activation_checkpoint_interval": 1}},
        {"train.activation_checkpointing": ActivationCheckpointing()},
    ),
    "activation_checkpointing.partition_activations": (
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"train.activation_checkpointing": None},
    ),
    "activation_checkpointing.cpu_checkpointing": (
        {
            "activation_checkpointing": {"cpu_checkpointing": True, "profile": False},
            "pipeline": {"activation_checkpoint_interval": 1},
        },
        {"train.activation_checkpointing": ActivationCheckpointing(offload=True)},
    ),
    "tensor_parallel.autotp_size": ({"tensor_parallel": {"autotp_size": 2}}, {"parallel.tp": 2}),
    "bfloat16": ({"bfloat16": {"enabled": True}}, {"train.precision": "bf16"}),
    "bf16.enabled": ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, {"train.precision": "fp32"}),
    "fp16.enabled": ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, {"train.precision": "fp16"}),
    "zero_optimization.stage": ({"zero_optimization": {"stage": 3}}, {"parallel.zero": 3}),
    "zero_optimization.cpu_offload": (
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        {"parallel.offload": "optimizer", "parallel.zero": 2},
    ),
    "zero_optimization.cpu_offload_param": (
        {"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}},
        {"parallel.offload": "parameters"},
    ),
    "zero_optimization.offload_optimizer.device": (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        {"parallel.offload": "optimizer"},
    ),
    "zero_optimization.offload_param.device": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}},
        {"parallel.offload": "parameters"},
    ),
    "zero_optimization.offload_optimizer.nvme_path": (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}},
        {"parallel.offload": "nvme", "parallel.nvme_dir": "/nvme"},
    ),
    "zero_optimization.offload_param.nvme_path": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}},
        {"parallel.offload": "nvme", "parallel.nvme_dir": "/nvme"},
    ),
    "tensorboard.enabled": ({"tensorboard": {"enabled": True}}, {"logging.tensorboard": True}),
    "wandb.enabled": ({"wandb": {"enabled": True}}, {"logging.wandb.project": "pipekit"}),
    "wandb.project": ({"wandb": {"enabled": True, "project": "gpt"}}, {"logging.wandb.project": "gpt"}),
    "wandb.team": ({"wandb": {"enabled": True, "team": "us"}}, {"logging.wandb.entity": "us"}),
    "checkpoint.use_node_local_storage": (
        {"checkpoint": {"use_node_local_storage": True}},
        {"checkpoint.storage": "local"},
    ),
}
"""For each key that pipekit has one for: a configuration of DeepSpeed's, and what a run then has."""


def value(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = getattr(config, key)
    return config


def test_every_key_that_pipekit_has_one_for_is_tried() -> None:
    assert {path for path, treatment in TREATMENTS.items() if treatment.ours} == {*HONOURED}


@pytest.mark.parametrize("path", HONOURED)
def test_a_key_gives_pipekits_key_its_value(path: str) -> None:
    section, expected = HONOURED[path]
    config = parse_config({**BASE, "deepspeed": section})
    assert {ours: value(config, ours) for ours in expected} == expected
    assert config.deepspeed == {}
    # The resolved configuration, which has both, loads back.
    assert parse_config(config.model_dump()) == config


def test_a_file_and_a_mapping_are_the_same_and_auto_is_pipekits(tmp_path: Path) -> None:
    section = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "zero_optimization": {"stage": 2, "overlap_comm": "auto", "reduce_bucket_size": 5e8},
        "gradient_clipping": "auto",
        "prescale_gradients": False,
    }
    (tmp_path / "ds.json").write_text(json.dumps(section))
    (tmp_path / "c.yaml").write_text(
        f"model: {{preset: tiny}}\ntrain: {{steps: 3, gradient_clipping: 2.0}}\ndeepspeed: {tmp_path}/ds.json\n"
    )
    config = load_config(tmp_path / "c.yaml", ["optimizer.lr=1e-5", "run.dir=runs/run"])
    given = {"train": {"steps": 3, "gradient_clipping": 2.0}, "optimizer": {"lr": 1e-5}}
    assert config == parse_config({**BASE, **given, "deepspeed": section})
    assert (config.train.gradient_clipping, config.optimizer.lr, config.train.global_batch_size) == (2.0, 1e-5, 8)
    assert config.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5e8}}
    # A key of the command line stands in the place of the file's.
    changed = load_config(tmp_path / "c.yaml", ["deepspeed.zero_optimization.stage=1"])
    assert (changed.parallel.zero, changed.deepspeed) == (1, config.deepspeed)


def test_values_that_do_not_agree_are_one_error_with_both_places(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 8}))
    (tmp_path / "c.yaml").write_text(
        f"model: {{preset: tiny}}\ntrain: {{steps: 3, global_batch_size: 8}}\nparallel:\n  zero: 1\n"
        f"deepspeed: {tmp_path}/ds.json\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/ds.json: zero_optimization.stage=2 asks for parallel.zero=2, and parallel.zero=1 is given "
        f"({tmp_path}/c.yaml:4); remove one of them, or make them agree"
    )


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {},
         "deepspeed.fp16.enabled=true asks for train.precision=fp16, and train.precision=bf16 is given"),
        ({"bf16": {}, "bfloat16": {"enabled": True}}, {}, "deepspeed.bfloat16: is the old name of deepspeed.bf16"),
        ({"bf16": {"enabled": False}}, {"train.precision": "bf16"}, "asks for train.precision=fp32, and"),
        ({"gradient_accumulation_steps": 4}, {}, "deepspeed.gradient_accumulation_steps=4: the global batch follows"),
        ({"gradient_accumulation_steps": 3, "train_batch_size": 8}, {}, "do not divide train.global_batch_size=8"),
        ({"gradient_accumulation_steps": 3, "train_batch_size": 8}, {"parallel.dp": 2},
         "deepspeed.gradient_accumulation_steps=3 asks for train.global_batch_size=6, and train.global_batch_size=8"),
        ({"zero_optimization": {"stage": 4}}, {}, "deepspeed.zero_optimization.stage=4: must be a whole number"),
        ({"aio": {"block_size": 1048576}}, {},
         "aio.block_size=1048576: has no effect here, since files are mapped into memory, without DeepSpeed's "
         "asynchronous I/O"),
        ({"zero_optimization": {"stage": 2}}, {"parallel.pp": 2}, "parallel.zero=2 does not go with parallel.pp=2"),
        ({"optimizer": {"type": "OneBitAdam"}}, {}, "compress gradients to one bit"),
        ({"optimizer": {"params": {"max_coeff": 1}}}, {}, "deepspeed.optimizer: has no type, such as AdamW"),
        ({"scheduler": {"type": "Sawtooth"}}, {}, "scheduler.type=Sawtooth"),
        ({"wandb": {"enabled": True}}, {"logging.wandb": False}, "and logging.wandb=false is given"),
        ({"wandb": {"enabled": True, "team": "x"}}, {"logging.wandb": False}, "logging.wandb.entity=false is given"),
        ("no/such.json", {}, "no/such.json: cannot be read as a DeepSpeed configuration"),
        (3, {}, "deepspeed=3: must be a mapping of keys"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(section: Any, given: dict[str, Any], message: str) -> None:
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    with pytest.raises(ConfigError) as caught:
        parse_config({**BASE, "deepspeed": section}, overrides)
    assert message in str(caught.value)


def test_initialize_takes_pipekits_defaults_for_auto() -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "stage3_max_live_parameters": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "steps_per_print": None,
    }
    assert fill_auto(config, precision="bf16") == {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 0}},
        "steps_per_print": None,
    }
    batch = fill_auto({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, precision="fp32")
    assert batch == {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}


def test_what_deepspeed_takes_where_nothing_is_said_gives_way() -> None:
    section = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}}
    ours = parse_config({**BASE, "deepspeed": section}, ["optimizer.lr=0.02"])
    assert (ours.optimizer.lr, ours.scheduler.args["warmup_max_lr"]) == (0.02, 0.02)
    theirs = parse_config({**BASE, "deepspeed": section})
    assert (theirs.optimizer.lr, theirs.optimizer.weight_decay) == (1e-3, 0.0)


def test_partitioned_activations_are_pipekits_and_need_ranks_to_share_them() -> None:
    section = {"activation_checkpointing": {"partition_activations": True}, "tensor_parallel": {"autotp_size": 2}}
    config = parse_config({**BASE, "parallel": {"sequence_parallel": False}, "deepspeed": section})
    assert config.train.activation_checkpointing == ActivationCheckpointing(partition=True)
    with pytest.raises(ConfigError, match=r"parallel\.tp=1; try parallel\.tp=2"):
        parse_config({**BASE, "deepspeed": {"activation_checkpointing": {"partition_activations": True}}})
