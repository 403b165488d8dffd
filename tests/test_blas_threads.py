"""The number of BLAS threads follows what others leave; what the user or a quota says is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.blas import openblas_threads
from server.blas_threads import CpuTimes, allowed_processors, threads_beside

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is for Linux alone")
ROOT = Path(__file__).parents[1]
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
needs_openblas = pytest.mark.skipif(
    openblas_threads() is None or PROCESSORS < 2, reason="no OpenBLAS with several threads here"
)
COUNTS = """
import os
from server.blas import load_openblas, openblas_threads
from server.blas_threads import CpuTimes
load_openblas()
threads = openblas_threads()
own = frozenset(os.sched_getaffinity(0))
at = 0.0
def look(others):
    global at
    before = CpuTimes(own, at, at * others, 0.0)
    at += 1
    threads.look(before, CpuTimes(own, at, at * others, 0.0))
    return threads.count
"""


def run(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", COUNTS + code],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]  # the log comes before


@pytest.mark.parametrize(
    ("free", "threads", "wanted"),
    [
        (2.0, 2, 2),
        (1.6, 2, 2),
        (1.4, 2, 1),
        (1.6, 1, 1),
        (1.7, 1, 2),
        (0.2, 2, 1),
        (-3.0, 2, 1),
        (60.9, 64, 61),
        (63.4, 64, 63),
        (100.0, 1, 64),
    ],
)
def test_threads_beside_is_what_is_free(free: float, threads: int, wanted: int) -> None:
    assert threads_beside(free, threads, 64) == wanted


@given(st.floats(-4, 70), st.integers(1, 64), st.integers(1, 64))
def test_threads_beside_settles_at_once(free: float, threads: int, most: int) -> None:
    settled = threads_beside(free, threads, most)

    assert 1 <= settled <= most
    assert threads_beside(free, settled, most) == settled
    assert settled == 1 or settled <= free + 0.5


@given(st.lists(st.floats(-4, 70), min_size=2, max_size=8), st.integers(1, 64))
def test_threads_beside_is_never_less_for_more_room(rooms: list[float], threads: int) -> None:
    counts = [threads_beside(free, threads, 64) for free in sorted(rooms)]

    assert all(less <= more for less, more in pairwise(counts))


def test_cpu_times_tell_others_from_the_process() -> None:
    before = CpuTimes(frozenset({0, 1}), 10.0, 100.0, 50.0)

    assert CpuTimes(frozenset({0, 1}), 12.0, 104.0, 51.0).others_since(before) == 1.5
    assert CpuTimes(frozenset({0, 1}), 12.0, 100.5, 51.0).others_since(before) == 0.0
    assert before.others_since(before) == 0.0


def test_cpu_times_count_the_processors_of_the_process(tmp_path: Path) -> None:
    own = sorted(os.sched_getaffinity(0))
    other = max(own) + 1
    columns = "100 20 30 1000 500 3 2 45 7 7"  # busy for 200 ticks; guests are part of the first two
    lines = ["cpu  9 9 9 9 9 9 9 9 9 9", *(f"cpu{number} {columns}" for number in (*own, other)), "intr 5"]
    (tmp_path / "stat").write_text("\n".join(lines))

    ticks = CpuTimes.now(tmp_path).busy_seconds * os.sysconf("SC_CLK_TCK")

    assert ticks == pytest.approx(200 * len(own))


def test_cpu_times_of_this_machine_grow() -> None:
    before = CpuTimes.now()
    sum(range(10**6))
    now = CpuTimes.now()

    assert now.own_seconds > before.own_seconds > 0
    assert now.busy_seconds >= before.busy_seconds


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/\n", {"cpu.max": "100000 100000"}),
        ("0::/pod/box\n", {"pod/cpu.max": "150000 100000", "pod/box/cpu.max": "max 100000"}),
        ("0::/of/the/host\n", {"cpu.max": "100000 100000"}),
        ("0::/small\n", {"small/cpu.max": "5000 100000"}),
        ("4:cpu,cpuacct:/box\n0::/\n", {"cpu,cpuacct/box/cpu.cfs_quota_us": "100000"}),
    ],
)
def test_allowed_processors_keep_to_the_quota(cgroup: str, files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(cgroup)
    groups = tmp_path / "groups"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
        if name.endswith("cfs_quota_us"):
            (groups / name).with_name("cpu.cfs_period_us").write_text("100000")

    assert allowed_processors(tmp_path, groups) == 1


def test_allowed_processors_without_a_quota_are_those_of_the_affinity(tmp_path: Path) -> None:
    assert allowed_processors(tmp_path, tmp_path) == PROCESSORS
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("3:cpu:/\n0::/\n")
    (tmp_path / "cpu.max").write_text("max 100000")
    assert allowed_processors(tmp_path, tmp_path) == PROCESSORS


@needs_openblas
def test_blas_threads_give_way_at_once_and_come_back_later() -> None:
    out = run(f"print(threads.count, look(0), look({PROCESSORS}), *(look(0) for _ in range(4)))")

    assert out.split() == [*[str(PROCESSORS)] * 2, *["1"] * 4, str(PROCESSORS)]


@needs_openblas
def test_blas_threads_keep_what_the_user_chose() -> None:
    fixed = run("print(threads.count, threads.fixed)", OPENBLAS_NUM_THREADS="2", OMP_NUM_THREADS="1")
    most = run("print(threads.count, threads.fixed, *(look(0) for _ in range(9)))", OMP_NUM_THREADS="1")
    unset = run("print(threads.count, threads.fixed)", OPENBLAS_NUM_THREADS="")

    assert fixed.split() == ["2", "True"]
    assert most.split() == ["1", "False", *["1"] * 9]
    assert unset.split() == [str(PROCESSORS), "False"]


@needs_openblas
def test_blas_threads_are_no_more_than_the_affinity() -> None:
    first = min(os.sched_getaffinity(0))
    out = run(f"os.sched_setaffinity(0, {{{first}}}); threads.keep_to_quota(); print(threads.count)")

    assert out.split() == ["1"]
