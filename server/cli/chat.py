"""`mlx-graft chat`: talk with a running server, one question or many. A client; main thread.

Text of the model is printed as it comes, without the control characters that could drive the terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from server.cli.calls import DEFAULT_URL
from server.cli.client import ApiKey, ApiKeyFile, Client, ClientError, Url
from server.cli.output import fail, say, warn
from server.printable import escape_controls

__all__ = ["chat"]

_HELP = "/model NAME talks to another model, /models lists them, /reset forgets the conversation, /quit ends."


@dataclass(slots=True)
class _Conversation:
    """What was said, and to whom; a turn that failed leaves no trace."""

    client: Client
    model: str | None
    system: str | None
    options: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> Generator[str]:
        """The answer's text, piece by piece; the turn is kept once the answer is complete."""
        asked = [*self.turns, {"role": "user", "content": question}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"messages": system + asked, **self.options}
        if self.model is not None:
            body["model"] = self.model
        answer = ""
        for piece in self.client.stream_chat(body):
            answer += piece
            yield piece
        self.turns = [*asked, {"role": "assistant", "content": answer}]

    def models(self) -> list[str]:
        listing = self.client.parse(self.client.call("GET", "/v1/models"))
        return [str(model["id"]) for model in listing.get("data", ())]


def chat(
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", help="Ask this and end; else talk, or read a pipe.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Base or adapter that answers; the active one if left out.", metavar="NAME"
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.", metavar="TEXT")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Limit for each answer.", metavar="TOKENS")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, max=2, help="0 always takes the likeliest token.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Talk with a running server, or ask it one question."""
    given = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        with Client(url, api_key, api_key_file) as client:
            conversation = _Conversation(client, model, system, options)
            if question is None and sys.stdin.isatty():
                _talk(conversation)
            else:
                _ask_once(conversation, sys.stdin.read().strip() if question is None else question)
    except ClientError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _ask_once(conversation: _Conversation, question: str) -> None:
    if not question:
        fail("expected a question, as an argument or on standard input, but it is empty.", code=2)
    _print_answer(conversation, question)


def _print_answer(conversation: _Conversation, question: str) -> None:
    begun = False
    try:
        with closing(conversation.ask(question)) as pieces:
            for piece in pieces:
                begun = begun or bool(piece)
                sys.stdout.write(escape_controls(piece, keep="\n\t"))
                sys.stdout.flush()
    finally:
        if begun:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _talk(conversation: _Conversation) -> None:
    with suppress(ImportError):  # gives input() a history and editing; not every Python has it
        import readline  # noqa: F401
    say(f"Talking with {conversation.client.url}. {_HELP}")
    while True:
        try:
            line = input(f"{conversation.model or 'default'}> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        try:
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                _obey(conversation, line)
            elif line:
                _print_answer(conversation, line)
        except ClientError as error:
            warn(f"error: {error}")
        except KeyboardInterrupt:
            warn("Stopped.")


def _obey(conversation: _Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/models":
        for name in conversation.models():
            say(name)
    elif command == "/model" and argument:
        served = conversation.models()
        if argument != "default" and argument not in served:
            say(f"{argument} is not among those that are loaded ({', '.join(served)}); asking for it anyway.")
        conversation.model = None if argument == "default" else argument
    elif command == "/reset":
        conversation.turns = []
        say("Forgotten.")
    else:
        say(_HELP)
