"""The port on which rank 0 listens for the others."""

from __future__ import annotations

import errno
import socket

from pipekit.errors import LaunchError


def choose_port(requested: int | None) -> int:
    """Return `requested` if nobody listens there, or a free port where none is requested.

    The port is free at the time of asking. Rank 0 binds it a moment later; who starts it has to be ready for
    the rare case that somebody else was faster.

    Raises:
        LaunchError: if the requested port is taken, or not allowed.
    """
    if requested is None:
        return _bind(0)
    if not 1 <= requested <= 65535:
        raise LaunchError(f"port {requested} must be between 1 and 65535; try 29500")
    try:
        return _bind(requested)
    except OSError as error:
        why = "another process listens on it" if error.errno == errno.EADDRINUSE else error.strerror
        raise LaunchError(
            f"port {requested} cannot be used ({why}), and rank 0 must be able to listen there; "
            f"try {_bind(0)}, or give no port and a free one is chosen"
        ) from None


def _bind(port: int) -> int:
    # All interfaces and both families, with address reuse: as torch's store binds it.
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
        bound: int = server.getsockname()[1]
        return bound
