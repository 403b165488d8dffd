"""How much memory the process may take, where a limit is in force and where none is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from server.engine.memory_limits import headroom_bytes, total_bytes

ASK = "from server.engine.memory_limits import *; print(total_bytes({}), headroom_bytes())"


def test_a_device_tells_what_may_be_taken_of_it() -> None:
    assert total_bytes({"memory_size": 16, "max_recommended_working_set_size": 12}) == 12
    assert total_bytes({"total_memory": 80}) == 80


def test_there_is_headroom_and_less_than_the_total() -> None:
    assert 0 < headroom_bytes() < total_bytes({})


@pytest.mark.skipif(sys.platform != "linux", reason="what is in use is read from /proc")
@pytest.mark.parametrize("option", ["-d", "-v"])
def test_a_limit_of_the_process_counts(option: str) -> None:
    limit_bytes = 3 << 30
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'ulimit {option} {limit_bytes >> 10} && exec "$@"',
            "bash",
            sys.executable,
            "-c",
            ASK,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    total, headroom = map(int, done.stdout.split())
    assert total == limit_bytes
    assert 0 < headroom < limit_bytes
