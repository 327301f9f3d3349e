"""The configuration of a run: typed sections, read from YAML."""

from pipekit.config.batch import BatchPlan, plan_batch
from pipekit.config.callbacks_config import WandbConfig
from pipekit.config.compare import conflicting_keys
from pipekit.config.data_config import DataConfig, SourceEntry
from pipekit.config.json_schema import config_json_schema
from pipekit.config.load import ModelConfigSource, load_config, load_model_config, load_stored_config, parse_config
from pipekit.config.optimizer_config import OptimizerConfig
from pipekit.config.resolve import resolve_layout
from pipekit.config.schema import Config

__all__ = [
    "BatchPlan",
    "Config",
    "DataConfig",
    "ModelConfigSource",
    "OptimizerConfig",
    "SourceEntry",
    "WandbConfig",
    "config_json_schema",
    "conflicting_keys",
    "load_config",
    "load_model_config",
    "load_stored_config",
    "parse_config",
    "plan_batch",
    "resolve_layout",
]
