"""mlx_lm.server with what this project's server has, so that the comparison is fair.

OpenBLAS is loaded before MLX is imported, and the listening socket's backlog holds all connections that a
load opens at once: with the 5 that http.server asks for, the system drops some, and they come a second later.
Takes mlx_lm.server's own arguments.
"""

from __future__ import annotations

from http.server import ThreadingHTTPServer

from server.blas import load_openblas

load_openblas()

from mlx_lm.server import main  # noqa: E402 (MLX may be imported only from here on)

_BACKLOG = 2048  # uvicorn's

if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = _BACKLOG
    main()
