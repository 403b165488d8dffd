"""Loads from an adapters root while another process swaps its files, folders and links: what gets out of it.

    python -m tests.adapters.swaps [--loads 10000]

Beside the root lies an adapter that answers otherwise than any in the root, and JSON and tensors with a word
that nothing in the root has. The second process puts links to them where adapters were a moment ago, and
takes them away again, while adapters are loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import structlog

from adapters_core.container import AdapterContainer
from tests.adapters.support import Site, read_model, site, write_model
from tests.models import adapter_tensors, adapter_values, make_adapter, write_adapter

SECRET = "xyzzy-outside"
"""Occurs in every outside file that is no adapter."""
_NAMES = ("x", "y")


@dataclass
class Places:
    """The root, with two adapters to swap and one to come back to, and what lies outside of it."""

    root: Path
    outside: Path
    inside_digests: frozenset[str]
    outside_digest: str


@dataclass
class Outcome:
    """What became of the loads. `leaks` are answers that hold anything of the outside; there must be none."""

    loads: int = 0
    served: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    leaks: list[str] = field(default_factory=list)
    internal: list[str] = field(default_factory=list)


def make_places(folder: Path, model_path: Path) -> Places:
    """Adapters of one config and different tensors, so that mixed folders are known as well."""
    model, root, outside = read_model(model_path), folder / "root", folder / "outside"
    inside = [make_adapter(root / name, model, seed=seed) for seed, name in enumerate((*_NAMES, "spare"), 1)]
    evil = make_adapter(outside / "evil", model, seed=9)
    values = adapter_values()
    (outside / "secret.json").write_text(json.dumps({"fine_tune_type": SECRET, SECRET: SECRET}))
    (outside / "words.json").write_text(json.dumps([SECRET] * 3))
    tensors = {f"{SECRET}.lora_a": mx.zeros((2, 2)), SECRET: mx.zeros(3, mx.int32)}
    write_adapter(outside / "named", {**values, "num_layers": SECRET}, tensors)
    write_adapter(outside / "foreign", values, {f"{SECRET}.{name}": one for name, one in adapter_tensors(
        model, values).items()})  # fmt: skip
    digests = frozenset(AdapterContainer.from_directory(path).digest for path in inside)
    return Places(root, outside, digests, AdapterContainer.from_directory(evil).digest)


@contextmanager
def swapping(places: Places) -> Iterator[None]:
    """A process that swaps until the block ends."""
    command = [sys.executable, __file__, "--swap", str(places.root), str(places.outside)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "expected the swaps to begin"
            yield
            assert process.poll() is None, "expected the swaps to go on to the end"
        finally:
            process.kill()


async def load_amid_swaps(started: Site, places: Places, loads: int) -> Outcome:
    """`loads` loads, in turn as calls, as requests that load on demand, and of folders and links."""
    outcome = Outcome()
    with swapping(places):
        while outcome.loads < loads:
            name = _NAMES[outcome.loads % 2]
            match outcome.loads % 3:
                case 0:
                    body = {"id": name, "replace": True}
                    await _ask(started, outcome, places, "POST", "/v1/adapters", body)
                case 1:
                    body = {"id": "z", "path": f"link-{name}", "replace": True}
                    await _ask(started, outcome, places, "POST", "/v1/adapters", body)
                case _:
                    await _ask(started, outcome, places, "DELETE", f"/v1/adapters/{name}", None)
                    await _ask(started, outcome, places, "POST", "/v1/adapters", {"id": name})
            outcome.loads += 1
            if outcome.loads % 10 == 0:
                await _ask(started, outcome, places, "GET", "/v1/adapters", None)
                await _ask(started, outcome, places, "GET", f"/v1/adapters/{name}", None)
    return outcome


async def _ask(started: Site, outcome: Outcome, places: Places, method: str, path: str, body: object) -> None:
    reply = await started.client.request(method, path, json=body)
    if SECRET in reply.text or places.outside_digest in reply.text or str(places.outside) in reply.text:
        outcome.leaks.append(f"{method} {path}: {reply.status_code} {reply.text}")
    if reply.status_code >= 500 and reply.status_code not in (503, 507):
        outcome.internal.append(f"{method} {path}: {reply.status_code} {reply.text}")
    if method != "POST":
        return
    if reply.is_success:
        outcome.served += 1
        if reply.json()["digest"] not in places.inside_digests:
            outcome.leaks.append(f"{method} {path}: {reply.json()['digest']}")
    else:
        outcome.refused[f"{reply.status_code} {reply.json()['error']['code']}"] += 1


def swap(root: Path, outside: Path) -> None:
    """Swap for ever. Every state that a reader may see, between any two of its own steps, comes by."""
    spare, hidden = root / "spare", root / ".swap"
    hidden.mkdir(exist_ok=True)
    evils = [outside / name for name in ("evil", "named", "foreign")]
    configs = [outside / "secret.json", outside / "words.json", outside / "evil" / "adapter_config.json",
               outside / "named" / "adapter_config.json"]  # fmt: skip
    weights = [folder / "adapters.safetensors" for folder in evils]
    kept = {name: Path(shutil.copytree(root / name, hidden / f"kept-{name}")) for name in _NAMES}
    print("swapping", flush=True)
    turn = 0
    while True:
        turn += 1
        for name in _NAMES:
            folder, link = root / name, root / f"link-{name}"
            _point(link, evils[turn % 3])
            _point(link, folder)
            match turn % 4:
                case 0:  # the whole folder becomes a link out of the root
                    folder.rename(hidden / name)
                    folder.symlink_to(evils[turn // 4 % 3])
                    folder.unlink()
                    (hidden / name).rename(folder)
                case 1:
                    _point(folder / "adapter_config.json", configs[turn // 4 % 4])
                    _back(kept[name], folder, "adapter_config.json")
                case 2:
                    _point(folder / "adapters.safetensors", weights[turn // 4 % 3])
                    _back(kept[name], folder, "adapters.safetensors")
                case _:  # files and folders that are there half, or not at all
                    if turn // 4 % 4 == 0:
                        shutil.rmtree(folder)
                        shutil.copytree(kept[name], folder)
                    elif turn // 4 % 4 == 1:
                        folder.rename(hidden / name)
                        folder.write_text(json.dumps([SECRET]))
                        folder.unlink()
                        (hidden / name).rename(folder)
                    else:
                        _point(folder / "adapters.safetensors", spare / "adapters.safetensors")
                        _back(kept[name], folder, "adapters.safetensors")


def _point(link: Path, target: Path) -> None:
    """Make `link` lead to `target` at one instant, whatever it was."""
    new = link.with_name(f".{link.name}.new")
    new.symlink_to(target)
    new.replace(link)


def _back(kept: Path, folder: Path, name: str) -> None:
    new = folder / f".{name}.new"
    shutil.copyfile(kept / name, new)
    new.replace(folder / name)


async def _measure(folder: Path, loads: int) -> Outcome:
    model_path = write_model(folder / "models" / "tiny")
    places = make_places(folder, model_path)
    async with site(model_path, places.root, cache_dir=folder / "cache") as started:
        return await load_amid_swaps(started, places, loads)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Loads amid swaps of files and links.")
    parser.add_argument("--loads", type=int, default=10_000)
    parser.add_argument("--swap", nargs=2, type=Path, metavar=("ROOT", "OUTSIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.swap is not None:
        swap(*options.swap)
    logging.disable()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = asyncio.run(_measure(Path(scratch).resolve(), options.loads))
    print(f"{outcome.loads} loads in {time.monotonic() - started:.0f} s: {outcome.served} served")
    for what, count in outcome.refused.most_common():
        print(f"  {what}: {count}")
    print(f"of the outside: {len(outcome.leaks)}; internal errors: {len(outcome.internal)}")
    for line in (*outcome.leaks[:5], *outcome.internal[:5]):
        print(f"  {line}")
    sys.exit(bool(outcome.leaks or outcome.internal))


if __name__ == "__main__":
    main()
