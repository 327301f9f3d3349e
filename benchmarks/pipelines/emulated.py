"""Emulated devices: layers that sleep where real ones compute, so that many ranks measure truly on a few cores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit import LayerSpec
from pipekit.weight_gradients import defer_weight_gradient
from pipelines.ours import build_ours
from pipelines.peers import build_deepspeed, build_torch
from pipelines.ranks import Say
from pipelines.turns import Contender, Step, Turns, take_turns
from pipelines.workload import Workload

