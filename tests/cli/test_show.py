"""`mlx-graft adapters show …` against a small real server, and the rows that it shares with `inspect`."""

from __future__ import annotations

import json

from server.cli.output import ranges

from .conftest import ADAPTER, SHOWN, CannedServer, Program


def test_all_that_the_server_says(command: Program, canned: CannedServer) -> None:
    done = command("adapters", "show", "mix", "--url", canned.url)
    assert canned.requests == [("GET", "/v1/adapters/mix", None)]
    assert (done.code, done.err) == (0, "warning: Another base.\n")
    lines = dict(line.split("  ", 1) for line in done.out.splitlines())
    shown = {name.strip(): value.strip() for name, value in lines.items()}
    assert shown.pop("loaded").startswith("2025-")
    assert shown.pop("last used").startswith("2025-")
    assert shown == {
        "id": "mix",
        "state": "ready, active, not in memory",
        "from": "svd of pirate 0.6, robot@2 -1",
        "versions": "1 previous, 2 current",
        "checkpoints": "100, 200",
        "format": "mlx",
        "type": "lora",
        "modules": "60",
        "kinds": "linear 60",
        "names": "q_proj 30, v_proj 30",
        "layers": "0-2, 7",
        "ranks": "8",
        "scales": "20",
        "dtypes": "float32",
        "tensors": "1.8 MiB",
        "base": "not named",
        "ignored": "iters",
        "digest": "sha256:00",
        "memory": "1.8 MiB",
        "in flight": "0",
        "requests": "12",
    }
    assert all(line == line.rstrip() for line in done.out.splitlines())
    done = command("adapters", "show", "mix", "--url", canned.url, "--json")
    assert json.loads(done.out) == {**ADAPTER, "id": "mix", **SHOWN}


def test_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-10"
