"""What the system may run out of while the server runs: threads, descriptors, memory.

Tries, rather than counts: limits of users, of processes and of control groups are all met. Knows no model and
no HTTP.
"""

from __future__ import annotations

import _thread
import errno
import os

__all__ = ["is_exhaustion", "lacking"]

_SPARE_DESCRIPTORS = 8  # about what a load needs at one time
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
_REFUSALS = frozenset({"can't start new thread", os.strerror(errno.EAGAIN)})  # Python's and MLX's words


def lacking() -> str | None:
    """A sentence that names what the system does not give to this process any more; None if nothing."""
    try:
        _start_thread()
        _open_descriptors()
    except (OSError, RuntimeError, MemoryError) as error:
        if is_exhaustion(error):
            return f"The system refuses the server {_what(error)}: {error}."
        raise
    return None


def is_exhaustion(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that the system has no more of something.

    That may pass, and says nothing of what was asked for.
    """
    return any(_is_exhaustion(one) for one in (error, error.__cause__))


def _is_exhaustion(error: BaseException | None) -> bool:
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and str(error) in _REFUSALS)


def _what(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "more open files"
    return "memory" if isinstance(error, MemoryError) else "more threads or memory"


def _start_thread() -> None:
    # Not `threading.Thread`: its `start` waits for ever for a thread that dies of want of memory.
    _thread.start_new_thread(int, ())


def _open_descriptors() -> None:
    opened: list[int] = []
    try:
        opened.extend(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(_SPARE_DESCRIPTORS))
    finally:
        for descriptor in opened:
            os.close(descriptor)
