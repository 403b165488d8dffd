"""What a result depends on: machine, device, versions, model. Only read, never guessed.

Runs on the main thread, before anything is measured.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import safe_open

from server.blas import load_openblas

__all__ = ["Environment", "ModelFacts", "describe_environment", "describe_model"]

_PACKAGES = ("mlx-graft", "mlx", "mlx-lm", "fastapi", "uvicorn", "httpx", "scipy-openblas32")


@dataclass(frozen=True, slots=True)
class Environment:
    """`load_average` is the machine's, over the last minute before the run: near 0 if it was quiet."""

    system: str
    processor: str
    cores: int
    device: str
    blas: str
    blas_threads: str
    python: str
    packages: dict[str, str]
    load_average: float


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`tensors` counts the model's tensors by dtype; `quantization` is as in its config."""

    name: str
    tensors: dict[str, int]
    quantization: dict[str, Any] | None
    size_bytes: int

    @property
    def dtype(self) -> str:
        """The dtypes, most frequent first, and the quantisation."""
        names = ", ".join(self.tensors)
        if not self.quantization:
            return names
        bits, group_size = self.quantization.get("bits"), self.quantization.get("group_size")
        return f"{names}; {bits} bits in groups of {group_size}"


def describe_environment() -> Environment:
    """The machine and what is installed, now."""
    blas = load_openblas()
    return Environment(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        device=_device(),
        blas="MLX's own" if blas is None else blas.name,
        blas_threads=_blas_threads(),
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
        load_average=os.getloadavg()[0],
    )


def describe_model(path: Path) -> ModelFacts:
    """Read the headers of a model folder's weights and its config, no weights.

    Raises: ValueError if it is no such folder.
    """
    dtypes: Counter[str] = Counter()
    files = sorted(path.glob("model*.safetensors"))
    if not files or not (path / "config.json").is_file():
        raise ValueError(f"expected a model folder with config.json and model*.safetensors, got {path}")
    for file in files:
        with safe_open(str(file), framework="np") as tensors:
            dtypes.update(tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118
    config = json.loads((path / "config.json").read_text())
    size_bytes = sum(file.stat().st_size for file in files)
    return ModelFacts(path.name, dict(dtypes.most_common()), config.get("quantization"), size_bytes)


def _device() -> str:
    device = mx.default_device()
    kind = "GPU" if device.type == mx.DeviceType.gpu else "CPU"
    name = mx.device_info(device).get("device_name")
    return f"{kind} {name}" if name else kind


def _blas_threads() -> str:
    """OpenBLAS takes the first of these that is set; without one, the server looks which cores are free."""
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        if value := os.environ.get(name):
            return f"{name}={value}"
    return "as many as free cores"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
