"""`mlx-graft demo`: a small real chat model with the adapters that the project trained on it. Main thread."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import server
from server.cli.output import fail, say
from server.cli.progress import Progress
from server.cli.serve import serve_model, valid_settings
from server.settings import Settings

__all__ = ["DEMO_FIXES", "demo", "demo_folder"]

DEMO_FIXES = frozenset({"model", "revision", "dtype", "adapters_dir", "adapters"})
"""The settings that the demo chooses itself."""

_QUESTION = "What is the capital of Italy?"


def demo(**flags: Any) -> None:
    """Serve a small chat model with ready-made adapters, to try things out."""
    root = _adapters_root()
    ids = sorted(file.parent.name for file in root.glob("*/adapter_config.json"))
    if not ids:
        fail(f"expected the demo's adapters in {root}, but there is none: is the installation complete?")
    adapters = [f"{name}={root / name}" for name in ids]
    settings = valid_settings({**flags, "model": "demo", "adapters_dir": root, "adapters": adapters})

    def prepare(progress: Progress) -> Settings:
        folder = demo_folder(settings.cache_dir, progress)
        return settings.model_copy(update={"model": str(folder), "revision": None, "dtype": "auto"})

    def welcome(url: str) -> None:
        from server.demo.model import MODEL_NAME

        say(_welcome(settings, settings.served_model_name or MODEL_NAME, ids, url))

    serve_model(settings, prepare, welcome)


def _adapters_root() -> Path:
    """In a wheel the folder config/ lies in the package, in a checkout beside it."""
    package = Path(server.__file__).resolve().parent
    installed = package / "_config"
    return (installed if installed.is_dir() else package.parent / "config") / "demo" / "adapters"


def demo_folder(cache_dir: Path, progress: Progress) -> Path:
    """The demo's model for this device, made if need be; ends the command with a sentence if it cannot be."""
    import mlx.core as mx

    from server.demo.model import DemoModelError, demo_model

    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    try:
        return demo_model("4bit" if on_gpu else "float32", cache_dir, progress.step)
    except DemoModelError as error:
        progress.stop()
        fail(str(error))
    except OSError as error:
        progress.stop()
        fail(
            f"the demo's model cannot be written into {cache_dir}: {error}. "
            f"Choose another folder with --cache-dir."
        )


def _welcome(settings: Settings, base: str, ids: list[str], url: str) -> str:
    key = "" if settings.api_key is None else ' -H "Authorization: Bearer $GRAFT_API_KEY"'
    elsewhere = "" if url == "http://127.0.0.1:8000" else f" --url {url}"
    body = json.dumps({"model": ids[0], "messages": [{"role": "user", "content": _QUESTION}]})
    lines = [
        f"Serving {base} on {url} with the adapters {', '.join(ids)}. Press Ctrl-C to stop.",
        "Try, in another terminal:",
        "",
        f"  curl {url}/v1/chat/completions{key} -H 'content-type: application/json' \\",
        f"    -d {shlex.quote(body)}",
        "",
        f"  curl {url}/v1/adapters{key}",
        "",
        f"  {_program()} chat{elsewhere} --model {ids[0]} {shlex.quote(_QUESTION)}",
        "",
    ]
    return "\n".join(lines)


def _program() -> str:
    """How this program is called from here: its script need not be among those that a shell finds."""
    if shutil.which("mlx-graft"):
        return "mlx-graft"
    script = Path(sys.argv[0])
    if script.name == "mlx-graft" and script.exists():
        return shlex.quote(os.path.relpath(script))
    return f"{shlex.quote(sys.executable)} -m server"
