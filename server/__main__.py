"""The program `mlx-graft`, also `python -m server`. Main thread.

Imports no MLX: the commands that need it load a fast BLAS first, and the others start quickly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

_SERVERS = frozenset({"serve", "demo"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` (by default the process') name. Always ends in SystemExit."""
    from server.cli.app import make_app

    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in given if not argument.startswith("-")), None)
    completing = any(name.startswith("_") and name.endswith("_COMPLETE") for name in os.environ)
    make_app(with_settings=command in _SERVERS or completing)(given, prog_name="mlx-graft")


if __name__ == "__main__":
    main()
