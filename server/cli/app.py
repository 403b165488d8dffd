"""The commands put together. Main thread."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Annotated, Any

import typer

from server.cli.output import say

__all__ = ["make_app"]

# What a report of a fault should name.
_REPORTED = ("mlx", "mlx-lm", "fastapi", "transformers")


def make_app(*, with_settings: bool) -> typer.Typer:
    """The command line.

    `with_settings` gives `serve` and `demo` a flag for each setting. The settings take long to import,
    so that the commands that are clients leave them out.
    """
    from server.cli.adapters import adapters_app
    from server.cli.bench import bench
    from server.cli.chat import chat
    from server.cli.check import check
    from server.cli.clean import clean
    from server.cli.compare import compare
    from server.cli.convert import convert

    app = typer.Typer(
        name="mlx-graft",
        help="One resident MLX base model; adapters chosen, blended, swapped and fused per request.",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
    )
    app.callback()(_root)
    _add_servers(app, with_settings)
    app.add_typer(adapters_app(), name="adapters", no_args_is_help=True)
    app.command("chat")(chat)
    app.command("compare")(compare)
    app.command("convert")(convert)
    app.command("check")(check)
    app.command("bench")(bench)
    app.command("clean")(clean)
    app.command("version")(version)
    return app


def version() -> None:
    """Show the versions of mlx-graft and of what it is built on."""
    say(_version_line("mlx-graft"))
    for name in _REPORTED:
        say(_version_line(name))
    say(f"Python {platform.python_version()} on {platform.platform()}")


def _version_and_exit(asked: bool) -> None:
    if asked:
        say(_version_line("mlx-graft"))
        raise typer.Exit


def _add_servers(app: typer.Typer, with_settings: bool) -> None:
    if with_settings:
        from server.cli.configuration import with_flags
        from server.cli.demo import DEMO_FIXES, demo
        from server.cli.serve import serve

        app.command("serve")(with_flags(serve))
        app.command("demo")(with_flags(demo, without=DEMO_FIXES))
        return

    def without_flags(**_: Any) -> None:
        raise RuntimeError("this command line was made without the servers' flags")

    app.command("serve", help="Serve a model, and its adapters, on an HTTP port.")(without_flags)
    app.command("demo", help="Serve a small chat model with ready-made adapters, to try things out.")(
        without_flags
    )


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", is_eager=True, callback=_version_and_exit
        ),
    ] = False,
) -> None:
    """What comes before a command; the option has done its work when this is called."""


def _version_line(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} (not installed)"
