"""DeepSpeed's `initialize` and `PipelineModule` replaced by pipekit's while code for DeepSpeed makes its engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.pipe.module import PipelineModule as DeepSpeedPipelineModule

import deepspeed
from pipekit.deepspeed.patches import use_joined_processes
from pipekit.engine.initialize import initialize
from pipekit.engine.module import PipelineModule


@contextmanager
def deepspeed_replaced() -> Iterator[None]:
    """Let `deepspeed.initialize` and DeepSpeed's `PipelineModule` make pipekit's engines and modules inside.

    The class is replaced wherever it was imported from, the function where it is called as `deepspeed.initialize`.
    Its `args` are passed over where there is a `config`, as scripts often give their own settings there.
    """
    original, construct = deepspeed.initialize, DeepSpeedPipelineModule.__init__

    def construct_ours(self: Any, *args: Any, **settings: Any) -> None:
        if type(self) is DeepSpeedPipelineModule:
            self.__class__ = PipelineModule
            self.__init__(*args, **settings)
        else:
            construct(self, *args, **settings)

    deepspeed.initialize = _initialize
    DeepSpeedPipelineModule.__init__ = construct_ours
    try:
        # Before the code inside calls deepspeed.init_distributed.
        use_joined_processes()
        yield
    finally:
        deepspeed.initialize = original
        DeepSpeedPipelineModule.__init__ = construct


def _initialize(args: Any = None, *rest: Any, **given: Any) -> tuple[Any, Any, Any, Any]:
    has_config = any(given.get(name) is not None for name in ("config", "config_params"))
    return initialize(None if has_config else args, *rest, **given)
