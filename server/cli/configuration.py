"""Settings for the command line: a flag for each, and every problem as a sentence that says where it is.

Knows pydantic's errors and typer's parameters; does not know what a setting does. Main thread, at the start.
"""

from __future__ import annotations

import difflib
import inspect
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from server.settings import ENV_PREFIX, Settings

__all__ = ["InvalidSettingsError", "flag_of", "load_settings", "with_flags"]

# They have our prefix and are not the server's: scripts/install reads the first, client commands the second.
_OTHER_VARIABLES = frozenset({"GRAFT_BACKEND", "GRAFT_URL"})
_SECRET = frozenset({"api_key"})


class InvalidSettingsError(Exception):
    """The settings cannot be used; `problems` are sentences, one for each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def load_settings(flags: Mapping[str, object]) -> Settings:
    """The settings from `flags` (field name → value; None is not given), the environment and the file.

    Raises: InvalidSettingsError with every problem that was found.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [], ())}
    problems = _variable_problems()
    try:
        settings = Settings(**given)  # pyright: ignore[reportArgumentType] (values are validated here)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems += [_sentence(details, given) for details in found if _is_cause(details)]
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{_config_name(given)}: expected TOML, but: {error}.")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{_config_name(given)}: expected a readable settings file, but: {error}.")
    else:
        if not problems:
            return settings
    raise InvalidSettingsError(problems)


def flag_of(name: str) -> str:
    """The flag of a field: max_n → --max-n."""
    return _extra(Settings.model_fields[name]).get("flag") or "--" + name.replace("_", "-")


def with_flags(command: Callable[..., None], *, without: frozenset[str] = frozenset()) -> Callable[..., None]:
    """`command`, which takes `**flags`, with a flag for every setting not in `without` nor its own parameter.

    Flags are taken as text and validated by `Settings`: a wrong value reads the same wherever it came from.
    """
    signature = inspect.signature(command, eval_str=True)
    own = {name: item for name, item in signature.parameters.items() if item.kind is not item.VAR_KEYWORD}
    parameters = list(own.values())
    for name, field in Settings.model_fields.items():
        if name in own or name in without:
            continue
        annotation = _option(name, field)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    def run(**values: Any) -> None:
        command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {item.name: item.annotation for item in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _option(name: str, field: FieldInfo) -> Any:
    extra = _extra(field)
    flag = flag_of(name)
    kind: Any
    if field.annotation is bool:
        kind, metavar, flag = bool | None, None, f"{flag}/--no-{flag[2:]}"
    elif get_origin(field.annotation) in (list, dict):
        kind, metavar = list[str] | None, extra.get("metavar", "TEXT") + " …"
    else:
        kind, metavar = str | None, extra.get("metavar", _metavar(name, field))
    help_text = f"{field.description}{_default(field)}"
    option = typer.Option(
        flag, help=help_text, metavar=metavar, show_default=False, rich_help_panel=extra["group"]
    )
    return Annotated[kind, option]


def _metavar(name: str, field: FieldInfo) -> str:
    text = str(field.annotation)
    if text.startswith("typing.Literal"):
        return text.removeprefix("typing.Literal[").rstrip("]").replace("'", "").replace(", ", "|")
    units = {"bytes": "BYTES", "seconds": "SECONDS", "tokens": "TOKENS", "dir": "FOLDER", "file": "FILE"}
    if name == "config":
        return "FILE"
    return units.get(name.rsplit("_", 1)[-1], "INTEGER" if field.annotation is int else "TEXT")


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None or field.is_required() or field.default is None:
        return ""
    shown = field.default
    if field.annotation is bool:
        shown = "yes" if shown else "no"
    elif hasattr(shown, "human_readable"):
        shown = shown.human_readable().replace(".0", "")
    return f" Default: {shown}."


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _variable_problems() -> list[str]:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | _OTHER_VARIABLES
    problems = []
    for variable, value in sorted(os.environ.items()):
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        if variable.upper() not in known:
            problems.append(
                f"{variable}: expected a setting's name after {ENV_PREFIX}, but there is no such setting."
                f"{_suggest(variable.upper(), known)}"
            )
        elif variable.upper() == "GRAFT_API_KEY" and not value:
            problems.append(f"{variable}: expected a key, but it is empty. Unset it to serve without a key.")
    return problems


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _is_cause(details: ErrorDetails) -> bool:
    """Whether an error is a problem itself, not pydantic's note that another one kept it from a default."""
    return details["type"] != "default_factory_not_called"


def _sentence(details: ErrorDetails, flags: Mapping[str, object]) -> str:
    if not details["loc"]:
        return details["msg"].removeprefix("Value error, ") + "."
    name = str(details["loc"][0])
    if details["type"] == "missing":
        return (
            f"{name} is not set: name it on the command line, as {ENV_PREFIX}{name.upper()}, "
            f"or in the settings file."
        )
    where = _origin(name, flags)
    if details["type"] == "extra_forbidden":
        return f"{where}: there is no such setting.{_suggest(name, Settings.model_fields)}"
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    message = message.replace("expected greater", "expected a number greater")
    message = message.replace("expected less", "expected a number less")
    if details["type"].startswith("path_"):
        message = "expected an existing folder"
    got = "" if name in _SECRET or "but" in message else f", but got {details['input']!r}"
    return f"{where}: {message}{got}."


def _origin(name: str, flags: Mapping[str, object]) -> str:
    """Where the value of a field came from, as a user would name it."""
    if name in flags:
        return flag_of(name) if name != "model" else "MODEL"
    variable = ENV_PREFIX + name.upper()
    if any(key.upper() == variable and value for key, value in os.environ.items()):
        return variable
    return f"{name} in {_config_name(flags)}"


def _config_name(flags: Mapping[str, object]) -> str:
    return str(flags.get("config") or os.environ.get(ENV_PREFIX + "CONFIG") or Path("the settings file"))
