"""The process that encodes text for `encode_in_order`: `python -m pipekit.data.encode_process TOKENIZER`.

It reads pickled lists of parts from its standard input, and writes a pickled answer for each. It ends with its input.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from array import array
from collections.abc import Sequence

import numpy as np

from pipekit.data.megatron import TokenArray
from pipekit.data.tokenizer import TextTokenizer, load_tokenizer
from pipekit.errors import DataError

Part = tuple[str, bool]
"""Text, and whether its document ends with it."""

Encoded = tuple[TokenArray, list[int]]
"""The token ids of several parts, one after the other `(N,)`, and how many each of them has."""


def encode_parts(tokenizer: TextTokenizer, parts: Sequence[Part]) -> Encoded:
    """Return the token ids of parts of documents, with the end token after each that ends one.

    Raises:
        DataError: if the tokenizer does not know a text.
    """
    token_ids, lengths = array("i"), []
    for (_, ends), ids in zip(parts, tokenizer.encode_batch([text for text, _ in parts]), strict=True):
        if ends:
            ids.append(tokenizer.end_token_id)
        token_ids.fromlist(ids)
        lengths.append(len(ids))
    return np.frombuffer(token_ids, np.int32), lengths


def main() -> None:
    """Answer until the input ends."""
    tokenizer = load_tokenizer(sys.argv[1])
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            parts = pickle.load(sys.stdin.buffer)
            try:
                answer: Encoded | DataError = encode_parts(tokenizer, parts)
            except DataError as error:
                answer = error
            pickle.dump(answer, sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
