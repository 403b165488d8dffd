"""`python -m benchmarks`: loads a fast BLAS first, as every process that imports MLX must."""

from __future__ import annotations

from server.blas import load_openblas

load_openblas()

from benchmarks.cli import main  # noqa: E402 (MLX may be imported only from here on)

if __name__ == "__main__":
    main()
