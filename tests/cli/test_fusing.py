"""`mlx-graft adapters fuse`: sums, and the bar while the server works."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from io import StringIO
from typing import Any, cast

import pytest
import typer
from rich.console import Console

from server.cli.client import Client, ClientError
from server.cli.fusing import call_with_bar, weighted

from .conftest import CannedServer, Program

REPORT = {"id": "pirate", "object": "adapter.fusion", "modules": 60, "saved_to": "new"}


class Telling:
    """A client whose server tells its progress and then ends in an event or an error."""

    def __init__(self, last: Mapping[str, Any] | ClientError) -> None:
        self.asked: list[Any] = []
        self._last = last

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[Mapping[str, Any]]:
        self.asked.append((path, body))
        for stage, total in (("merging", 3), ("comparing", 2), ("writing", 1000)):
            for done in range(0, total + 1, max(1, total // 3)):
                yield {"object": "adapter.fusion.progress", "stage": stage, "done": done, "total": total}
        if isinstance(self._last, ClientError):
            raise self._last
        yield self._last


def test_the_bar_goes_through_the_stages_and_the_report_comes_back() -> None:
    shown, client = StringIO(), Telling(REPORT)
    console = Console(file=shown, force_terminal=True, width=100)
    text = call_with_bar(cast(Client, client), "/v1/adapters/pirate/fuse", {"save_to": "new"}, console)
    assert json.loads(text) == REPORT
    assert client.asked == [("/v1/adapters/pirate/fuse", {"save_to": "new"})]
    for stage in ("Merging layers", "Comparing outputs", "Writing weights"):
        assert stage in shown.getvalue()


def test_an_error_ends_the_bar() -> None:
    client = Telling(ClientError("the disk is full."))
    with pytest.raises(ClientError, match="the disk is full"):
        call_with_bar(cast(Client, client), "/x", {}, Console(file=StringIO()))


def test_terms_of_a_sum() -> None:
    assert weighted("robot") == {"id": "robot"}
    assert weighted("robot=-0.5") == {"id": "robot", "weight": -0.5}
    with pytest.raises(typer.BadParameter, match="ID=WEIGHT"):
        weighted("robot=much")


def test_a_sum_is_one_call(command: Program, canned: CannedServer) -> None:
    options = ["--precision", "keep", "--weight", "0.5", "--with", "robot=-1", "--with", "haiku"]
    done = command("adapters", "fuse", "pirate", *options, "--url", canned.url)
    assert done.code == 0, done.err
    assert canned.requests == [
        (
            "POST",
            "/v1/adapters/pirate/fuse",
            {
                "precision": "keep",
                "weight": 0.5,
                "adapters": [{"id": "robot", "weight": -1}, {"id": "haiku"}],
            },
        )
    ]
