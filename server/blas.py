"""Gives MLX on a Linux CPU a fast BLAS: loads OpenBLAS before MLX is imported.

MLX's Linux CPU wheel is linked with the reference BLAS, whose matrix product is tens of times slower than
OpenBLAS'. A library that is already loaded with global visibility wins over the one that MLX was linked
with, so loading is all it takes. This module imports no MLX (it must run before MLX is imported), keeps no
state, and does not know what MLX will compute. It runs on the main thread, once, as the first thing that a
process does.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path

__all__ = ["OpenBlasOrderError", "OpenBlasUnavailable", "load_openblas"]

_OPENBLAS = "cmeel-openblas"  # its symbols carry no prefix, so that they can stand in for MLX's own
_CPU_BUILD = "mlx-cpu"
_CUDA_BUILDS = ("mlx-cuda-13", "mlx-cuda-12")
_FORTRAN_RUNTIME = "libgfortran.so.5"


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
    library = _installed_file(_OPENBLAS, "lib", "libopenblas.so")
    if library is None:
        _warn(f"OpenBLAS is not installed. Install it with `pip install {_OPENBLAS}`.")
        return None
    if _is_loaded(library):
        return library
    if "mlx.core" in sys.modules:
        raise OpenBlasOrderError(
            "expected load_openblas() to be called before mlx.core is imported, but mlx.core is imported "
            "already and has bound its own BLAS. Call load_openblas() before anything that imports mlx."
        )
    try:
        _load(library)
    except OSError as error:
        _warn(f"{library} could not be loaded: {error}. If it names a missing library, install that one.")
        return None
    return library


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


def _is_loaded(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


def _load(library: Path) -> None:
    """Load `library`, lending it MLX's own Fortran runtime where the system has none. Raises OSError."""
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        runtime = _installed_file(_CPU_BUILD, "mlx_cpu.libs", "libgfortran-")
        if _FORTRAN_RUNTIME not in str(error) or runtime is None:
            raise
        _load_renamed(runtime, _FORTRAN_RUNTIME)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _load_renamed(library: Path, name: str) -> None:
    """Load a copy of `library`, held in memory, that calls itself `name` (no longer than its file name).

    The dynamic linker takes a library that is loaded already for one that another asks for if its own name
    (ELF's DT_SONAME) is the one asked for. Wheels mangle that name to keep their copies apart.
    """
    mangled = library.name.encode()
    renamed = library.read_bytes().replace(mangled + b"\0", name.encode().ljust(len(mangled), b"\0") + b"\0")
    # The copy has no folder of its own to find its dependencies in: loading the original first loads them.
    ctypes.CDLL(str(library))
    descriptor = os.memfd_create(name)
    try:
        with open(descriptor, "wb", closefd=False) as copy:
            copy.write(renamed)
        ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _warn(reason: str) -> None:
    message = f"MLX will compute with the slow reference BLAS: {reason}"
    warnings.warn(message, OpenBlasUnavailable, stacklevel=3)
