"""The program `mlx-graft`, also `python -m server`. Main thread.

Imports no MLX: the commands that need it load a fast BLAS first, and the others start quickly.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["main"]

_SERVERS = frozenset({"serve", "demo"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` (by default the process') name. Always ends in SystemExit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in given if not argument.startswith("-")), None)
    completing = any(name.startswith("_") and name.endswith("_COMPLETE") for name in os.environ)
    if command in _SERVERS:
        signal.signal(signal.SIGINT, _leave)
    try:
        from server.cli.app import make_app

        make_app(with_settings=command in _SERVERS or completing)(given, prog_name="mlx-graft")
    except KeyboardInterrupt:  # before a command, or what it was doing, could take note of it
        raise SystemExit(130) from None


def _leave(*_: object) -> None:
    """Interrupt a start: nothing is lost, and imports and callbacks would swallow an exception."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a spinner hides the cursor
    os._exit(130)


if __name__ == "__main__":
    main()
