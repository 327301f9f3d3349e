"""The process that encodes documents for `encode_in_order`: `python -m pipekit.data.encode_process TOKENIZER [FORMAT]`.

It reads pickled lists of parts from its standard input, and writes a pickled answer for each. It ends with its input.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import sys
from pathlib import Path
from typing import cast

from pipekit.data.conversations import ConversationFormat
from pipekit.data.encoder import Encoded, build_encoder
from pipekit.errors import DataError


def main() -> None:
    """Answer until the input ends."""
    tokenizer_path, *conversations = sys.argv[1:]
    encode = build_encoder(Path(tokenizer_path), cast(ConversationFormat, conversations[0]) if conversations else None)
    gc.disable()  # of millions of token ids, none is in a cycle
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            parts = pickle.load(sys.stdin.buffer)
            try:
                answer: Encoded | DataError = encode(parts)
            except DataError as error:
                answer = error
            pickle.dump(answer, sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
