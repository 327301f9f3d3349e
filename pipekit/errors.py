"""The errors that pipekit raises for its users, and the exit codes of its commands.

Each message gives the place of the fault, the value, the rule that it breaks and what to type instead. The command line
shows only the message, without a traceback, and exits with the exit code of the error's class.
"""

from __future__ import annotations

import re
from enum import IntEnum

# C0 and C1 except tabs and line ends, halves of surrogate pairs, and what turns the direction of the text around it.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text that is safe to print on a terminal: control characters become escapes.

    Messages quote file names, keys and texts from any source; none of them may move the cursor, change the window's
    title or hide other text.

    Example:
        >>> printable("runs/a\\x1b[31m")
        'runs/a\\\\x1b[31m'
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class ExitCode(IntEnum):
    """Exit codes of the commands, from which a scheduler can see whether to try again."""

    DONE = 0
    BUG = 1
    """An unexpected error, outside the ranks of a run."""
    MISTAKE = 2
    """The command, the configuration, the data or the model is wrong: correct it first."""
    RANK_LOST = 3
    """A rank crashed, was killed, or could not be started: the same command resumes from the newest checkpoint."""
    HANG = 4
    """A wait reached its limit: the same command resumes from the newest checkpoint."""
    STORAGE = 5
    """A disk is full or read-only, or does not show written files: correct this first."""
    NUMBERS = 6
    """The numbers went wrong: not finite, a spike, or ranks that differ."""
    IN_USE = 7
    """Another process holds the run folder."""
    STOPPED = 75
    """Stopped on request, with a checkpoint of the last finished step: the same command resumes from there."""


class PipekitError(Exception):
    """Error with one clear message for the user: a mistake to correct, or a failure outside pipekit.

    Attributes:
        exit_code: exit code of a command that this error ends.
        is_everyones: True if all ranks raise the error at the same point, so that they can handle it together.
    """

    exit_code: ExitCode = ExitCode.MISTAKE
    is_everyones = False


class ConfigError(PipekitError):
    """The configuration is wrong: an unknown key, a wrong type, or values that contradict each other."""


class LayoutError(PipekitError):
    """The degrees of parallelism, the devices and the layers do not fit together."""


class DataError(PipekitError):
    """The training text, the tokenizer or the token cache cannot be used."""


class CheckpointError(PipekitError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint has changed since it was written; an earlier one may be intact."""


class LaunchError(PipekitError):
    """The processes of a run could not be started, or one of them failed."""


class CommunicationError(PipekitError):
    """A wait for another rank failed or lasted longer than the limit."""

    exit_code = ExitCode.RANK_LOST


class StorageError(PipekitError):
    """A file could not be written or read: the file system is full, read-only or slow, or refuses permission."""

    exit_code = ExitCode.STORAGE


class PathError(StorageError):
    """A file could not be written or read because its path is wrong: a folder in it is missing, or is a file."""

    exit_code = ExitCode.MISTAKE


class NumbersError(PipekitError):
    """A loss, an activation or a gradient is not finite or jumps, or a repeated computation gives another result."""

    exit_code = ExitCode.NUMBERS


class ReplicaError(NumbersError):
    """Ranks that must hold the same tensor hold different ones."""


class InUseError(PipekitError):
    """Another process holds the run folder."""

    exit_code = ExitCode.IN_USE


class StoppedError(PipekitError):
    """A run stopped on request, after saving its last finished step."""

    exit_code = ExitCode.STOPPED


class ScheduleError(ConfigError):
    """A pipeline schedule cannot be run."""
