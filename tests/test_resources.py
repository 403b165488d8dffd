"""What the system refuses is known, and told from other errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_core.errors import InvalidAdapterError
from server.errors import to_api_error
from server.resources import is_exhaustion, lacking

ROOT = Path(__file__).parents[1]
LIMITED = """
import os, resource
from server.resources import lacking
assert lacking() is None
{limit}
print(lacking())
"""


def lacking_in_a_process(limit: str) -> str:
    """What `lacking` says in a process after the code of `limit`."""
    code = LIMITED.format(limit=limit)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lacking_is_nothing_here() -> None:
    descriptors = len(os.listdir("/dev/fd"))
    assert [lacking() for _ in range(20)] == [None] * 20
    assert len(os.listdir("/dev/fd")) == descriptors


def test_lacking_names_open_files() -> None:
    out = lacking_in_a_process("resource.setrlimit(resource.RLIMIT_NOFILE, (6, 6))")

    assert (
        out == "The system refuses the server more open files: [Errno 24] Too many open files: '/dev/null'.\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of addresses is Linux' way")
def test_lacking_names_threads() -> None:
    limit = (
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "size = pages * resource.getpagesize() + (1 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "import threading; threading.stack_size(1 << 26)"
    )

    assert "more threads or memory: can't start new thread" in lacking_in_a_process(limit)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "many"),
        OSError(errno.ENFILE, "many"),
        OSError(errno.ENOMEM, "much"),
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
    ],
)
def test_exhaustion_is_a_503_that_may_pass(error: Exception) -> None:
    known = to_api_error(error)

    assert is_exhaustion(error)
    assert (known.status, known.code) == (503, "out_of_resources")
    assert "Retry-After" in known.headers


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), RuntimeError("other"), ValueError()])
def test_other_errors_stay_internal(error: Exception) -> None:
    assert not is_exhaustion(error)
    assert to_api_error(error).status == 500


def test_an_adapter_is_not_to_blame_for_exhaustion() -> None:
    error = InvalidAdapterError("a", ["cannot be read: Too many open files"])
    error.__cause__ = OSError(errno.EMFILE, "many")
    assert to_api_error(error).code == "out_of_resources"
    error.__cause__ = error  # as a future that is awaited twice leaves it
    assert to_api_error(error).code == "adapter_invalid"
