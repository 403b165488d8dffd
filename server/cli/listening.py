"""Takes the address of a server before its model is loaded, so that a taken port is told of at once.

Knows sockets only. The sockets are bound and do not listen yet: until the server does, callers are refused.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

__all__ = ["AddressError", "bind", "url_of"]


class AddressError(Exception):
    """The address cannot be listened on; the message is a sentence."""


def bind(host: str, port: int) -> list[socket.socket]:
    """One bound TCP socket for each address of `host`, all on `port`, or on the same free port if it is 0.

    Raises: AddressError, with nothing left open.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise AddressError(
            f"expected --host to be an address of this machine, but {host!r}: {error}."
        ) from error
    bound: list[socket.socket] = []
    missing: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            bound.append(_bound(family, kind, protocol, (address[0], port, *address[2:])))
        except OSError as error:
            # A name may stand for an address of a kind that this machine does not have, such as IPv6.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                missing = error
                continue
            _close(bound)
            raise AddressError(_sentence(host, port, error)) from error
        port = port or bound[0].getsockname()[1]
    if not bound:
        raise AddressError(f"expected --host to be an address of this machine, but {host!r}: {missing}.")
    return bound


def url_of(host: str, sockets: Sequence[socket.socket]) -> str:
    """The URL at which a client on this machine reaches a server on these sockets."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{sockets[0].getsockname()[1]}"


def _bound(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _close(sockets: Sequence[socket.socket]) -> None:
    for listener in sockets:
        listener.close()


def _sentence(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {host} is in use: stop what listens there, or choose another port with --port."
        )
    if error.errno == errno.EACCES:
        return f"port {port} of {host} is not allowed to this user: choose one above 1023 with --port."
    return f"port {port} of {host} cannot be listened on: {error}."
