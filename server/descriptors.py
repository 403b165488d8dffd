"""The limit of open files: kept as the operator set it, raised where it is too low, shared out.

Knows no sockets and no HTTP. Changes a limit of the process; main thread, at the start.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["DescriptorError", "Descriptors", "import_mlx_lm", "share_descriptors"]

# What a server opens beside its connections: shards of a model, adapters, copies, libraries, a log.
_OWN = 96
_LEAST_CONNECTIONS = 16

# Connections that are accepted in one turn of the event loop, before any of them can be refused.
_LEAST_BACKLOG = 16
_MOST_BACKLOG = 1024


class DescriptorError(Exception):
    """So few files may be open that nothing can be served; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Descriptors:
    """How the limit of open files is shared out: `connections` at once, `backlog` that wait for one."""

    connections: int
    backlog: int


def share_descriptors(wanted_connections: int) -> Descriptors:
    """Share out the limit that is in force; a lower one than needed is raised as far as it may be, first.

    Raises:
        DescriptorError: it is too low for any connection.
    """
    soft = _files_allowed(_OWN + wanted_connections + _MOST_BACKLOG)
    least = _OWN + _LEAST_CONNECTIONS + _LEAST_BACKLOG
    if soft < least:
        raise DescriptorError(
            f"expected a limit of at least {least} open files, but it is {soft}: raise it, for example with "
            f"`ulimit -n 1024`, or with LimitNOFILE= for a service of systemd."
        )
    backlog = max(_LEAST_BACKLOG, min(_MOST_BACKLOG, soft // 8))
    return Descriptors(min(wanted_connections, soft - _OWN - backlog), backlog)


def _files_allowed(needed: int) -> int:
    """The soft limit, after it was raised to `needed` if it was lower; never lowered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, most = _counted(soft), _counted(hard)
    raised = min(needed, most)
    if raised <= soft:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError):  # macOS has a ceiling of its own below an unlimited hard limit
        return soft
    return raised


def _counted(limit: int) -> int:
    return 2**31 if limit == resource.RLIM_INFINITY else limit


def import_mlx_lm() -> None:
    """Import mlx-lm, and keep the limit of open files.

    `mlx_lm.utils` sets it to 2,048 and 4,096 when it is imported: down from what an operator chose, for good
    unless the process is privileged, and with an error where the operator allows fewer.
    """
    with _limits_kept():
        import mlx_lm  # noqa: F401


@contextmanager
def _limits_kept() -> Iterator[None]:
    """Nothing sets a limit within. A hard limit that was lowered could not be restored afterwards."""
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit
