"""A model's modules for commands that compare adapters with it; its weights stay on disk. Main thread.

Imports MLX and mlx-lm when called, which takes seconds; the commands that need neither stay quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.output import fail
from server.descriptors import import_mlx_lm

if TYPE_CHECKING:
    import mlx.nn as nn

__all__ = ["ModelFolder", "Scale", "lazy_model", "require_mlx"]

ModelFolder = Annotated[
    Path | None,
    typer.Option(
        "--model", help="Folder of the base model in MLX's format.", metavar="FOLDER", show_default=False
    ),
]


Scale = Annotated[
    float | None,
    typer.Option(
        "--scale",
        help="Factor of the adapter's change, in place of the one in its config in mlx-lm's format.",
        metavar="NUMBER",
        show_default=False,
    ),
]


def require_mlx() -> None:
    """End the command with a sentence where MLX cannot be imported."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        fail(
            f"MLX cannot be imported: {error}. On Linux exactly one of its back ends has to be installed: "
            f"mlx-graft[cpu] or mlx-graft[cuda13]."
        )


def lazy_model(folder: Path) -> nn.Module:
    """The model in `folder`, none of its weights read; code that comes with it is not run.

    Ends the command with a sentence if it cannot be loaded.
    """
    import_mlx_lm()
    from mlx_lm.utils import load_model

    if not folder.is_dir():
        fail(f"--model: there is no folder {str(folder)!r}.", code=2)
    try:
        return load_model(folder, lazy=True)[0]
    except Exception as error:  # mlx-lm and MLX raise what they like on files they cannot use
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        fail(f"--model: {folder.name!r} cannot be loaded: {reason}.")
