"""Actions of a schedule: the forward or backward of a stage for a micro-batch, written as `0F3`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from pipekit.errors import ConfigError

ActionKind = Literal["F", "B", "I", "W"]
"""`F` forward, `B` whole backward, `I` input gradient, `W` weight gradient."""

ACTION_NAMES: dict[ActionKind, str] = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}

_PATTERN = re.compile(r"(\d+)([FBIW])(\d+)")


@dataclass(frozen=True, order=True)
class Action:
    """Action of a schedule: a stage's forward or backward for one micro-batch.

    Example:
        >>> str(Action(stage=0, kind="F", micro_batch=3))
        '0F3'
        >>> Action.parse("2B1")
        Action(stage=2, kind='B', micro_batch=1)
    """

    stage: int
    kind: ActionKind
    micro_batch: int

    @property
    def activation_change(self) -> int:
        """Change in the number of activations that the rank holds: +1 for a forward, -1 for the end of a backward."""
        return {"F": 1, "B": -1, "I": 0, "W": -1}[self.kind]

    @classmethod
    def parse(cls, text: str) -> Action:
        """Parse an action from text such as `0F3`.

        Raises:
            ConfigError: if `text` is not a stage, one of F, B, I, W, and a micro-batch.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"{text!r} is not an action; write stage, kind (F, B, I or W) and micro-batch, as in 0F3")
        stage, kind, micro_batch = match.groups()
        return cls(int(stage), cast(ActionKind, kind), int(micro_batch))

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"
