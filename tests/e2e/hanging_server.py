"""Serves a tiny model whose layer hangs, or ends the generation thread, when a file tells it to.

    python -m tests.e2e.hanging_server MODEL ROOT WISHES PORT_FILE

While the file WISHES/hang is there, a forward waits; WISHES/die ends the thread. Run by test_dead_engine.py.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from server.cache_dir import default_cache_dir
from server.cli.serve import prepare_mlx

prepare_mlx(default_cache_dir())

import mlx.nn as nn  # noqa: E402

from server.app import create_app  # noqa: E402
from server.cli.listening import bind  # noqa: E402
from server.cli.running import end_process, run  # noqa: E402
from server.engine.engine import Engine  # noqa: E402
from server.engine.loop import LoopOptions  # noqa: E402
from server.engine.model import LoadedModel, load_model  # noqa: E402
from server.settings import Settings  # noqa: E402


class Obedient(nn.Module):
    """A norm that first does as the files in a folder say."""

    def __init__(self, norm: nn.Module, wishes: Path) -> None:
        super().__init__()
        self.norm = norm
        self._wishes = wishes

    def __call__(self, x: Any) -> Any:
        while (self._wishes / "hang").exists():
            (self._wishes / "hangs").touch()
            time.sleep(0.05)
        if (self._wishes / "die").exists():
            raise SystemExit("as a test wishes")
        return self.norm(x)


def main(model: str, root: str, wishes: str, port_file: str) -> None:
    """Serve until told to stop."""

    def load() -> LoadedModel:
        loaded = load_model(model)
        inner: Any = loaded.model.model
        inner.norm = Obedient(inner.norm, Path(wishes))
        return loaded

    def on_ready() -> None:
        Path(port_file).write_text(str(sockets[0].getsockname()[1]))

    settings = Settings(
        model=model, adapters_dir=Path(root), health_timeout_seconds=1.5, shutdown_timeout_seconds=1
    )
    engine = Engine(
        load,
        LoopOptions(),
        prompt_cache_bytes=1 << 20,
        max_waiting=8,
        grace_seconds=1.0,
        stuck_seconds=settings.health_timeout_seconds,
    )
    sockets = bind("127.0.0.1", 0)
    app = create_app(settings, engine)
    code = run(
        app,
        settings,
        app.state.connections,
        sockets,
        backlog=64,
        on_ready=on_ready,
        give_up=lambda: engine.stop(0.0),
        died=engine.died,
        on_end=lambda: None,
        say=print,
    )
    end_process(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
