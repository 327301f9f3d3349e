"""Seeds that depend on what is drawn, never on which rank draws it."""

from __future__ import annotations

import hashlib


def fold_seed(seed: int, *path: int | str) -> int:
    """Return a 63-bit seed for one use of randomness, named by `path`.

    The same seed and path give the same result on every rank and under every layout, and different paths give
    independent ones. Initial weights use `("init", layer name)`, dropout `("layer", step, micro-batch, layer
    index)`.

    Example:
        >>> fold_seed(1, "init", "head") == fold_seed(1, "init", "head")
        True
        >>> fold_seed(1, "init", "head") == fold_seed(1, "init", "embed")
        False
    """
    text = "/".join([str(seed), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1
