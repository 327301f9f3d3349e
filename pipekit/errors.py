"""The errors that pipekit raises for its users.

Each message says where the fault is, the value, the rule that it breaks and what to type instead. The command line
shows the message alone, without a traceback, and ends with its exit code, 2 unless said otherwise.
"""

from __future__ import annotations


class PipekitError(Exception):
    """A mistake of the user's, or a failure outside pipekit, that has one clear message.

    Attributes:
        exit_code: of the command that it ends.
    """

    exit_code = 2


class ConfigError(PipekitError):
    """The configuration is wrong: an unknown key, a wrong type, or values that contradict each other."""


class LayoutError(PipekitError):
    """The degrees of parallelism, the devices and the layers do not fit together."""


class DataError(PipekitError):
    """The training text, the tokenizer or the token cache cannot be used."""


class CheckpointError(PipekitError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not as it was written; an earlier one may be whole."""


class LaunchError(PipekitError):
    """The processes of a run could not be started, or one of them failed."""


class CommunicationError(PipekitError):
    """A wait for another rank failed or lasted longer than the limit."""


class ReplicaError(PipekitError):
    """Ranks that must hold the same tensor hold different ones."""


class ScheduleError(ConfigError):
    """A pipeline schedule cannot be run."""
