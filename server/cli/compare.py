"""`mlx-graft compare`: one question to several models of a server, side by side. A client; main thread.

What is printed of the answers is as safe as in `chat`: no control characters, no markup of rich's.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from server.cli.calls import DEFAULT_URL, Json, run_call
from server.cli.client import ApiKey, ApiKeyFile, Client, Url
from server.printable import escape_controls

__all__ = ["compare", "comparison_view"]

# A token that another model finds e² times less likely than the one that gave it is worth a look.
_NOTABLE_NATS = 2.0
_SHOWN_TOKENS = 5
_SHOWN_CHARS = 20

Answer = Mapping[str, Any]


def compare(
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="What all are asked.", show_default=False)
    ],
    models: Annotated[
        str,
        typer.Option(
            "--models",
            help="Two to eight names, with commas between them; 'base' is the base whatever its name.",
            metavar="NAMES",
            show_default=False,
        ),
    ],
    system: Annotated[str | None, typer.Option("--system", help="System message.", metavar="TEXT")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Limit for each answer.", metavar="TOKENS")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, max=2, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the draws, which are the same for all models.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    json: Json = False,
) -> None:
    """Ask several models the same, and show how likely each finds the others' answers."""
    messages = [{"role": "system", "content": system}] if system else []
    given = {"max_tokens": max_tokens, "seed": seed}
    body = {
        "messages": [*messages, {"role": "user", "content": question}],
        "temperature": temperature,
        **{name: value for name, value in given.items() if value is not None},
    }

    def call(client: Client, path: str, body: Mapping[str, Any]) -> str:
        return client.call("POST", path, {**body, "models": _names(client, models)})

    def tell(comparison: Mapping[str, Any]) -> None:
        Console().print(comparison_view(comparison))

    run_call(url, api_key, api_key_file, json, tell, "POST", "/v1/compare", body, call=call)


def _names(client: Client, given: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    if "base" not in names:
        return names
    listed = [str(model["id"]) for model in client.parse(client.call("GET", "/v1/models")).get("data", ())]
    return (
        names if "base" in listed or not listed else [listed[0] if name == "base" else name for name in names]
    )


def comparison_view(comparison: Mapping[str, Any]) -> Group:
    """A comparison object of the server: the answers side by side, how likely, and where they part."""
    models = [str(model) for model in comparison.get("models") or ()]
    answers: Sequence[Answer] = comparison.get("answers") or ()
    return Group(
        _answers(models, answers),
        Text("\nMean log-probability of a token (nats) under each model; less its author's in brackets:\n"),
        _means(models, answers),
        Text("\nWhat another model finds least likely, and how likely each finds it:\n"),
        _notable(models, answers),
    )


def _answers(models: Sequence[str], answers: Sequence[Answer]) -> Table:
    table = Table(expand=True, header_style="bold")
    for model in models:
        table.add_column(_plain(model), ratio=1, overflow="fold")
    table.add_row(*(_highlighted(answer) for answer in answers))
    return table


def _means(models: Sequence[str], answers: Sequence[Answer]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("answer of")
    for model in models:
        table.add_column(_plain(model), justify="right")
    for model, answer in zip(models, answers, strict=False):
        pairs = zip(answer.get("mean_logprobs") or (), answer.get("mean_differences") or (), strict=False)
        cells = [
            _mean(mean, difference, index == answer.get("index"))
            for index, (mean, difference) in enumerate(pairs)
        ]
        table.add_row(_plain(model), *cells)
    return table


def _mean(mean: float | None, difference: float | None, is_own: bool) -> str:
    if mean is None or difference is None:
        return "-"
    return f"{mean:.2f}" if is_own else f"{mean:.2f} ({difference:+.2f})"


def _notable(models: Sequence[str], answers: Sequence[Answer]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("answer of")
    table.add_column("after", no_wrap=True)
    table.add_column("token", no_wrap=True)
    for model in models:
        table.add_column(_plain(model), justify="right")
    for model, answer in zip(models, answers, strict=False):
        before, rows = "", []
        for text, token in _texts(answer):
            # A part of a character is no text yet: then its bytes are shown.
            shown = repr(text or bytes(token.get("bytes") or ()))
            rows.append((_gap(answer, token), repr(before), shown, token.get("logprobs") or ()))
            before = (before + text)[-_SHOWN_CHARS:]
        rows.sort(key=lambda row: row[0])
        for gap, after, shown, logprobs in rows[:_SHOWN_TOKENS]:
            if gap <= -_NOTABLE_NATS:
                cells = [f"{logprob:.2f}" for logprob in logprobs]
                table.add_row(_plain(model), _plain(after), _plain(shown), *cells)
    return table


def _highlighted(answer: Answer) -> Text:
    """The answer, in colour what others find unlikely; plain if its tokens do not make up its text."""
    message = answer.get("message") or {}
    content = str(message.get("content") or "")
    shown = Text()
    for text, token in _texts(answer):
        style = "bold yellow" if _gap(answer, token) <= -_NOTABLE_NATS else ""
        shown.append(escape_controls(text, keep="\n"), style)
    return shown if shown.plain == escape_controls(content, keep="\n") else _plain(content)


def _texts(answer: Answer) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each token with the text that is complete with it: characters may be made of several."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in answer.get("tokens") or ():
        yield decoder.decode(bytes(token.get("bytes") or ())), token


def _gap(answer: Answer, token: Mapping[str, Any]) -> float:
    """How much less likely the token is where it is least so, compared with its own model; at most 0."""
    logprobs = token.get("logprobs") or [0.0]
    index = answer.get("index")
    own = logprobs[index] if isinstance(index, int) and index < len(logprobs) else max(logprobs)
    return min(0.0, min(logprobs) - own)


def _plain(text: str) -> Text:
    return Text(escape_controls(text, keep="\n"))
