"""How much memory the process may take: the device's, the machine's, and what limits are in force.

Reads what the operating system tells; keeps nothing. Any thread.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

__all__ = ["headroom_bytes", "return_freed_memory", "total_bytes"]

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_DEVICE_TOTALS = ("max_recommended_working_set_size", "memory_size", "total_memory")  # Metal's two, CUDA's
_UNLIMITED = 2**60  # version 1 of cgroups writes a number near 2**63 where there is no limit
_KIB = 1024
_M_MMAP_THRESHOLD = -3  # mallopt(3)
_OWN_MAPPING_BYTES = 2**20


def total_bytes(device: Mapping[str, str | int] | None = None) -> int:
    """What the process may take in all: of the device's memory, or, on a CPU, of the machine's.

    `device` is what MLX tells of it (None: of its default one). On a CPU, the limits of the control group and
    of the process (`ulimit -d`, `ulimit -v`) count where they are smaller than the machine.
    """
    told = mx.device_info() if device is None else device
    of_device = [value for name in _DEVICE_TOTALS if isinstance(value := told.get(name), int) and value > 0]
    if of_device:
        return min(of_device)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min([machine, *(limit for limit, _ in _limits())]))


def headroom_bytes() -> int:
    """How much more the process may take now. Of a GPU, only what MLX has taken is known to be taken."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return max(0, total_bytes() - mx.get_active_memory())
    left = [limit - used for limit, used in _limits()]
    available = _fields(_PROC / "meminfo").get("MemAvailable")
    if available is not None:
        left.append(available * _KIB)
    return max(0, min(left, default=total_bytes() - mx.get_active_memory()))


def return_freed_memory() -> None:
    """Let what MLX frees on a Linux CPU go back to the system at once, for the rest of the process.

    Otherwise the C library keeps buffers of up to 32 MiB for later, where they count as used.
    """
    if sys.platform == "linux" and mx.default_device().type == mx.DeviceType.cpu:
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # which musl does not have
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes for each limit that is set and whose use is known."""
    status = _fields(_PROC / "self" / "status")
    for kind, field in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY and field in status:
            yield soft, status[field] * _KIB
    for folder, limit_name, used_name, idle_name in _cgroups():
        for group in (folder, *folder.parents):
            limit, used = _number(group / limit_name), _number(group / used_name)
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit, used - _fields(group / "memory.stat").get(idle_name, 0)
            if group == _CGROUPS:
                break


def _cgroups() -> Iterator[tuple[Path, str, str, str]]:
    """The process's control groups that may limit memory: folder, and the names of what they tell.

    File pages that are not in use do not count as used: the kernel gives them up before it kills anybody.
    """
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.strip("/")
        if not controllers:
            yield _CGROUPS / inside, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder = _CGROUPS / "memory" / inside
            yield folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of lines such as `Name: 12 kB` or `name 12`."""
    try:
        words = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}
