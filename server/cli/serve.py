"""`mlx-graft serve`: a model and its adapters over HTTP. Main thread.

Imports MLX only once the settings are valid and the port is ours; `load_openblas` comes before that.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer

from server.cli.configuration import InvalidSettingsError, load_settings
from server.cli.listening import AddressError, bind, url_of
from server.cli.models import require_mlx
from server.cli.output import fail, say, warn
from server.cli.progress import Progress
from server.descriptors import DescriptorError, import_mlx_lm, share_descriptors
from server.logs import configure_logging, writes_json
from server.settings import Settings

__all__ = ["base_name", "prepare_mlx", "serve", "serve_model", "valid_settings"]

_log = structlog.get_logger(__name__)


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Base model: a folder in MLX's format, or a hub id such as mlx-community/Qwen3-4B-4bit.",
            show_default=False,
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Serve a model, and its adapters, on an HTTP port."""
    settings = valid_settings({"model": model, **flags})

    def welcome(url: str) -> None:
        say(f"Serving {base_name(settings)} on {url}. Press Ctrl-C to stop.")

    serve_model(settings, lambda progress: settings, welcome)


def base_name(settings: Settings) -> str:
    """The name that the base is served under."""
    return settings.served_model_name or Path(settings.model).expanduser().resolve().name


def valid_settings(flags: dict[str, Any]) -> Settings:
    """The settings, with the logs set up as they say; ends the command with exit code 2 if they are wrong."""
    try:
        settings = load_settings(flags)
    except InvalidSettingsError as error:
        fail(*error.problems, code=2)
    configure_logging(settings.log_level, settings.log_format)
    return settings


def prepare_mlx(cache_dir: Path) -> None:
    """Give MLX a fast BLAS where it needs one and its variables, and mlx-lm no say in the process' limits.

    To be called before anything imports MLX or mlx-lm. MLX's compiled kernels are kept under `cache_dir`.
    """
    from server.blas import load_openblas
    from server.mlx_variables import set_mlx_variables

    set_mlx_variables(cache_dir)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_openblas()
    for warning in caught:
        warn(f"warning: {warning.message}")
    require_mlx()
    import_mlx_lm()


def keep_beside_others() -> None:
    """From now on, choose the number of BLAS threads by what other processes leave."""
    from server.blas import openblas_threads

    if threads := openblas_threads():
        threads.keep_beside_others()


def serve_model(
    settings: Settings, prepare: Callable[[Progress], Settings], welcome: Callable[[str], None]
) -> None:
    """Serve until told to stop, and end the process. `prepare` makes what is needed and the last settings.

    `welcome` is called with the URL once requests are answered. A failure ends the command with a sentence.
    """
    try:
        descriptors = share_descriptors(settings.max_connections)
        sockets = bind(settings.host, settings.port)
    except (AddressError, DescriptorError) as error:
        fail(str(error))
    if descriptors.connections < settings.max_connections:
        _log.warning(
            "fewer_connections", reason="the limit of open files", connections=descriptors.connections
        )
        settings = settings.model_copy(update={"max_connections": descriptors.connections})
    url = url_of(settings.host, sockets)
    tell = _log.info if writes_json(settings.log_format) else warn
    with Progress(tell) as progress:
        prepare_mlx(settings.cache_dir)
        keep_beside_others()
        with _interrupts_raised():
            settings = prepare(progress)
        _run(settings, sockets, descriptors.backlog, progress, lambda: welcome(url), tell)


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """An interrupt is KeyboardInterrupt within, so that what is being written is taken away again."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _run(
    settings: Settings,
    sockets: list[Any],
    backlog: int,
    progress: Progress,
    welcome: Callable[[], None],
    tell: Callable[[str], None],
) -> None:
    # These take seconds to import, and must not be before `prepare_mlx`.
    from server.app import create_app
    from server.cli.running import StartError, end_process, run

    if Path(settings.model).expanduser().is_dir():
        progress.step(f"Loading {base_name(settings)} …")
    elif settings.model.count("/") == 1:
        progress.stop()  # the hub's own progress bars are shown instead
        tell(f"Fetching {settings.model}, unless it is in the cache, and loading it …")

    def on_ready() -> None:
        progress.stop()
        welcome()

    problem: str | None = None
    code = 1
    try:
        app = create_app(settings)
        code = run(
            app,
            settings,
            app.state.connections,
            sockets,
            backlog=backlog,
            on_ready=on_ready,
            give_up=lambda: app.state.engine.stop(0.0),
            died=lambda: app.state.engine.died(),
            on_end=progress.stop,
            say=tell,
        )
    except StartError as error:
        problem = _reason(error.__cause__)
    except OSError as error:
        problem = f"port {settings.port} of {settings.host} cannot be listened on: {error}."
    progress.stop()
    if problem is not None:
        warn(f"error: {problem}")
    end_process(code)


def _reason(failure: BaseException | None) -> str:
    """Why the application did not start. The log has the whole of what nobody foresaw."""
    from adapters_core.errors import AdapterError
    from server.adapters.errors import LifeCycleError
    from server.engine.errors import EngineError
    from server.errors import ApiError

    if isinstance(failure, AdapterError | LifeCycleError | EngineError | ApiError | OSError):
        return f"the server cannot start: {str(failure).rstrip('.')}."
    _log.error("the server could not start", exc_info=failure)
    return f"the server could not start, for a reason that was not foreseen: {failure!r}"
