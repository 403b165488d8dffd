"""Cold loads, many of them: every answer right, threads and open files as many as at the start.

    python -m benchmarks.cold_loads [--loads 2000] [--threads 100] [--model FOLDER]

Five adapters take turns in memory for two, so that each request loads its own anew. The answers are compared
with mlx-lm's. Where control groups of version 1 can be made, the server may really have no more threads
than `--threads`; elsewhere they are counted. For Linux.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from server.cache_dir import default_cache_dir
from server.cli.serve import prepare_mlx

prepare_mlx(default_cache_dir())

from mlx_lm import generate, load  # noqa: E402

from adapters_core.container import AdapterContainer  # noqa: E402
from benchmarks.adapters import RANK_8_QV  # noqa: E402
from benchmarks.library import AdapterLibrary, AdapterSet  # noqa: E402
from benchmarks.loads import stories  # noqa: E402
from benchmarks.sides import Question, Side, SideContext, SideKind, SideSpec, open_side  # noqa: E402
from server.demo.model import demo_model  # noqa: E402

_ADAPTERS = AdapterSet(RANK_8_QV, 5)
_TOKENS = 4
_PIDS = Path("/sys/fs/cgroup/pids")
_TELL_EVERY = 100


def main(
    loads: Annotated[int, typer.Option(min=1, help="Requests, each of which loads.")] = 2000,
    threads: Annotated[int, typer.Option(min=1, help="Threads that the server may have.")] = 100,
    model: Annotated[Path | None, typer.Option(help="Model folder; the demo's when unset.")] = None,
) -> None:
    """Load cold adapters again and again; exit code 1 if an answer is wrong or anything grows."""
    path = (model or demo_model("float32", default_cache_dir(), typer.echo)).resolve()
    with tempfile.TemporaryDirectory(prefix="mlx-graft-loads-") as folder:
        library = AdapterLibrary(path, Path(folder, "adapters"), seed=0)
        root = library.root((_ADAPTERS,))
        question = stories(0, 1, _TOKENS)[0]
        right = _right_answers(path, root, question)
        context = SideContext(path, library, Path(folder), ready_seconds=120, load_seconds=120)
        raise typer.Exit(asyncio.run(_run(context, question, right, loads, threads)))


async def _run(
    context: SideContext, question: Question, right: dict[str, str], loads: int, threads: int
) -> int:
    wrong: Counter[str] = Counter()
    spec = SideSpec(SideKind.GRAFT, (_ADAPTERS,), memory_adapters=2)
    async with open_side(spec, context) as side:
        pid = side.child.process.pid
        with _limited(pid, threads) as how:
            typer.echo(f"At most {threads} threads, {how}.")
            await _ask(side, question, list(right))
            first = most = _held(pid)
            for index in range(loads):
                name = list(right)[index % len(right)]
                wrong[name] += (await _ask(side, question, [name]))[0] != right[name]
                held = _held(pid)
                most = (max(most[0], held[0]), max(most[1], held[1]))
                if (index + 1) % _TELL_EVERY == 0 or index + 1 == loads:
                    typer.echo(
                        f"{index + 1} loads: {wrong.total()} wrong, {held[0]} threads, {held[1]} files"
                    )
    typer.echo(f"At first {first[0]} threads and {first[1]} files, at most {most[0]} and {most[1]}.")
    # asyncio and its clients' connections come and go; a leak would be hundreds.
    return 1 if wrong.total() or most[0] > min(threads, first[0] + 8) or most[1] > first[1] + 16 else 0


async def _ask(side: Side, question: Question, names: list[str]) -> list[str]:
    texts: list[str] = []
    for name in names:
        asked = Question(question.system, question.prompt, question.max_tokens, name)
        texts += [answer.text for answer in (await side.ask([asked])).answers]
    return texts


def _right_answers(model_path: Path, root: Path, question: Question) -> dict[str, str]:
    """What mlx-lm answers with each adapter."""
    model, tokenizer = load(str(model_path))[:2]
    prompt = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True)
    answers: dict[str, str] = {}
    for name in _ADAPTERS.ids:
        adapter = AdapterContainer.from_directory(root / name)
        adapter.load(into=model)
        answers[name] = generate(model, tokenizer, prompt, max_tokens=question.max_tokens)
        adapter.unload(from_=model)
    return answers


@contextmanager
def _limited(pid: int, threads: int) -> Iterator[str]:
    """Let the process have so many threads at most, where the system can be told; says how it is."""
    group = _PIDS / f"mlx-graft-loads-{os.getpid()}"
    try:
        group.mkdir()
        (group / "pids.max").write_text(str(threads))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        yield "counted"
        return
    try:
        yield "by a control group"
    finally:
        (_PIDS / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def _held(pid: int) -> tuple[int, int]:
    """The threads and the open files of a process."""
    return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))


if __name__ == "__main__":
    typer.run(main) if sys.platform == "linux" else typer.echo("This is for Linux.", err=True)
