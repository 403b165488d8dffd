"""Logs: structlog for our lines and, through the standard library, for everyone else's (uvicorn's, mlx-lm's).

`configure_logging` sets structlog's and logging's own process-wide configuration, once, at the start, on the
main thread. It does not know what is logged. Lines go to standard error: standard output is the commands'.
"""

from __future__ import annotations

import io
import logging
import logging.config
import sys
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from server.printable import escape_controls
from server.settings import LogFormat, LogLevel

__all__ = ["configure_logging", "writes_json"]

# At level info they tell each step that they take.
_TALKATIVE = (
    "httpx",
    "httpcore",
    "huggingface_hub",
    "filelock",
    "urllib3",
    "asyncio",
    "uvicorn.error",
    "watchfiles",
)

# Its warnings, a line for each request that is no HTTP, are told by `server.connections` in fewer.
_FLOODED = "uvicorn.connections"

# Its lines repeat, without the request's id, those of the application's own access log.
_REPEATING = "uvicorn.access"


def configure_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Send every log line of the process, ours and the libraries', to standard error in one form.

    `log_format` auto is console on a terminal, else json. Control characters in what is logged are escaped,
    so that nothing from a request starts a line of its own, drives a terminal or reads as what it is not. May
    be called again.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _drop_uvicorn_colours,
        _escape,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    formatter = {
        "()": structlog.stdlib.ProcessorFormatter,
        "foreign_pre_chain": [structlog.stdlib.ExtraAdder(), *shared],
        "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(log_format)],
    }
    talkative_level = {"debug": "INFO", "info": "WARNING"}.get(level, level.upper())
    loggers: dict[str, dict[str, object]] = {name: {"level": talkative_level} for name in _TALKATIVE}
    loggers[_FLOODED] = {"level": "ERROR"}
    loggers[_REPEATING] = {"handlers": [], "propagate": False}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"structlog": formatter},
            "handlers": {"stderr": {"()": _StandardError, "formatter": "structlog"}},
            "root": {"level": level.upper(), "handlers": ["stderr"]},
            "loggers": loggers,
        }
    )
    logging.captureWarnings(True)


def writes_json(log_format: LogFormat) -> bool:
    """Whether lines are for programs, so that each line on standard error should be one of the log."""
    return log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is at that moment: a progress display takes its place while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # a log line must never stop what it tells of: logging's own rule
            self.handleError(record)


def _rendering(log_format: LogFormat) -> list[Processor]:
    if not writes_json(log_format):
        # Not rich's tracebacks: they show the values of local variables, a key's among them.
        plain = _plain_traceback
        return [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=plain
            )
        ]
    return [
        structlog.processors.format_exc_info,
        _escape_exception,
        structlog.processors.JSONRenderer(ensure_ascii=False),
    ]


def _plain_traceback(stream: TextIO, exc_info: ExcInfo) -> None:
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    stream.write(escape_controls(text.getvalue(), keep="\n"))


def _escape_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if isinstance(event.get("exception"), str):
        event["exception"] = escape_controls(event["exception"], keep="\n")
    return event


def _drop_uvicorn_colours(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)
    return event


def _escape(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {key: value if key == "exc_info" else _escaped(value) for key, value in event.items()}


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return escape_controls(value)
    if isinstance(value, dict):
        return {_escaped(name): _escaped(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_escaped(item) for item in value]
    return value
