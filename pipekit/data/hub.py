"""Names on the Hugging Face hub, as `data.source` and `data.tokenizer` give them: `hf://OWNER/NAME?option=value`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import parse_qsl

from pipekit.errors import DataError
from pipekit.settings.suggest import closest

SCHEME = "hf://"
_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


@dataclass(frozen=True)
class HubName:
    """Repository on the hub, such as `openai-community/gpt2`, and the options that stand behind it."""

    repository: str
    options: Mapping[str, str]


def parse_hub_name(text: str, *, key: str, known: tuple[str, ...]) -> HubName:
    """Return the parts of a name that begins with `hf://`.

    Args:
        text: the name.
        key: of the configuration, for messages.
        known: the options that there are.

    Raises:
        DataError: if it is no such name, or has another option.

    Example:
        >>> parse_hub_name("hf://owner/name?split=test", key="data.source", known=("split",))
        HubName(repository='owner/name', options={'split': 'test'})
    """
    name, _, query = text.removeprefix(SCHEME).partition("?")
    if not _NAME.fullmatch(name):
        raise DataError(f"{key}={text!r}: not a name on the Hugging Face hub; write hf://OWNER/NAME")
    options = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))
    for option in options:
        if option not in known:
            guess = closest(option, known)
            hint = f"did you mean {guess!r}?" if guess else f"there are {', '.join(known)}"
            raise DataError(f"{key}={text!r}: unknown option {option!r}; {hint}")
    return HubName(name, options)


@contextmanager
def asking_hub(where: str) -> Iterator[None]:
    """Run the block, and raise any error of the hub's libraries in it as one that says what was asked for."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # they raise errors of many kinds, of networks, files and names
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"{where}: cannot be read from the Hugging Face hub or its cache here: {reason}; check the name, the "
            "access of your account (hf auth login) and the network"
        ) from error
