"""How many threads OpenBLAS computes with: as many as there are processors that nobody else keeps busy.

The threads of a product wait for each other. Where another process takes the processor of one, all wait for
it, and a step takes ten times as long; with a thread fewer, the step takes its share. Knows no MLX, and runs
on a thread of its own.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

__all__ = ["BlasThreads", "CpuTimes", "allowed_processors", "threads_beside"]

_log = structlog.get_logger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.5
_LOOKS_BEFORE_MORE = 4
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_IDLE_COLUMNS = (3, 4)  # of a processor's line in /proc/stat: idle, and idle while it waits for a disk
_COUNTED_COLUMNS = 8  # those after it are part of others


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds until `at_seconds` that the process' processors were busy, for anybody and for the process."""

    processors: frozenset[int]
    at_seconds: float
    busy_seconds: float
    own_seconds: float

    @classmethod
    def now(cls, proc: Path = _PROC) -> CpuTimes:
        """Raises: OSError, ValueError: the system does not tell."""
        processors = frozenset(os.sched_getaffinity(os.getpid()))
        ticks = 0
        for line in (proc / "stat").read_text().splitlines():
            name, *columns = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in processors:
                counted = [int(column) for column in columns[:_COUNTED_COLUMNS]]
                ticks += sum(counted) - sum(counted[column] for column in _IDLE_COLUMNS)
        busy_seconds = ticks / os.sysconf("SC_CLK_TCK")
        return cls(processors, time.monotonic(), busy_seconds, time.process_time())

    def others_since(self, before: CpuTimes) -> float:
        """How many processors others kept busy since `before`, on the average."""
        seconds = self.at_seconds - before.at_seconds
        busy_seconds = self.busy_seconds - before.busy_seconds
        own_seconds = self.own_seconds - before.own_seconds
        return max(0.0, busy_seconds - own_seconds) / seconds if seconds > 0 else 0.0


def allowed_processors(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """How many processors the process may keep busy, by its affinity and the quotas of its control groups."""
    quotas = [float(len(os.sched_getaffinity(os.getpid())))]
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        # In a container the path may be the one outside of it, and the group itself is mounted as the root.
        group = root / path.strip("/")
        quotas += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return max(1, math.floor(min(quotas)))


def _quota(group: Path) -> float:
    """The processors' worth of time that a control group has, of version 2 or 1; infinite without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no group with a limit: "max" is no number
        return math.inf


def threads_beside(free: float, threads: int, most: int) -> int:
    """The threads to compute with, where there are `threads`, and others leave `free` processors.

    One more takes most of a processor, one fewer that half of one is missing, so that a load between the
    two does not make the number go to and fro.
    """
    stays = threads - 0.5 <= free < threads + 0.65
    return max(1, min(most, threads if stays else math.floor(free + 0.35)))


class BlasThreads:
    """The threads of the OpenBLAS that is loaded under `library_name`.

    Where OPENBLAS_NUM_THREADS is set, it is what the user wants, and stays. OMP_NUM_THREADS, like the
    processors and their quota, is the most.
    """

    def __init__(self, library_name: str) -> None:
        library = ctypes.CDLL(library_name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        self._get = library.scipy_openblas_get_num_threads
        self._set = library.scipy_openblas_set_num_threads
        self._most = self.count
        self._looks_with_room = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._get())

    @property
    def fixed(self) -> bool:
        """Whether the user chose the number."""
        number = os.environ.get("OPENBLAS_NUM_THREADS", "")
        return number.isdigit() and int(number) > 0

    def keep_to_quota(self) -> None:
        """At most as many as the process may use processors."""
        if not self.fixed:
            self._use(min(self.count, allowed_processors()))

    def look(self, before: CpuTimes, now: CpuTimes) -> None:
        """Fewer at once where others are busy; more once there was room several times in a row."""
        if now.processors != before.processors:
            return
        others = now.others_since(before)
        count = self.count
        free = min(allowed_processors(), len(now.processors) - others)
        wanted = threads_beside(free, count, self._most)
        self._looks_with_room = self._looks_with_room + 1 if wanted > count else 0
        if wanted < count or self._looks_with_room >= _LOOKS_BEFORE_MORE:
            self._looks_with_room = 0
            self._use(wanted)
            _log.debug("blas_threads", before=count, now=wanted, busy_with_others=round(others, 2))

    def keep_beside_others(self) -> None:
        """Look at what others do, again and again, from a thread that lives as long as the process."""
        if not self.fixed and self._most > 1:
            threading.Thread(target=self._keep_looking, name="blas-threads", daemon=True).start()

    def _keep_looking(self) -> None:
        try:
            before = CpuTimes.now()
            while True:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                now = CpuTimes.now()
                self.look(before, now)
                before = now
        except (OSError, ValueError) as error:
            _log.warning("blas_threads_stay", reason=f"the system does not tell who is busy: {error}")

    def _use(self, count: int) -> None:
        if count != self.count:
            self._set(count)
