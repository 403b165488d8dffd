"""mlx-lm's BatchGenerator, or this project's generation loop, with nothing around it: `MODEL bare|loop`.

The first is what the hardware and mlx-lm give without a server, the second what the engine gives without
HTTP, threads and text. Reads one JSON line per load from standard input and answers with one; ends with the
input. The clock runs from tokens to tokens: reading the prompts' text and writing the answers' is left out.
Base rows only; no prompt is cached. Both have the server's BLAS and variables of MLX, so that they differ in
nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TextIO

from server.cache_dir import default_cache_dir
from server.cli.serve import prepare_mlx

prepare_mlx(default_cache_dir())

import mlx.core as mx  # noqa: E402 (MLX may be imported only from here on)
from mlx_lm import load  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.tokenizer_utils import TokenizerWrapper  # noqa: E402

from benchmarks.load import Answer, LoadResult  # noqa: E402
from server.engine.context import ModelContext  # noqa: E402
from server.engine.loop import GenerationLoop, LoopOptions  # noqa: E402
from server.engine.messages import Failed, Finished, SamplingParams, Submit, Token  # noqa: E402
from server.engine.model import load_model  # noqa: E402

__all__ = ["Generation", "bare_generator", "generate", "loop_generator", "private_output"]


class Generation(NamedTuple):
    """Rows under way: `insert(index, prompt, max_tokens)` begins one; `step()` tells what came of one step.

    That is (index, token, ended): a token that is None was a stop token, which is counted and is no text, or
    was told before.
    """

    insert: Callable[[int, list[int], int], None]
    step: Callable[[], Iterable[tuple[int, int | None, bool]]]
    close: Callable[[], None]


_FREED_SHARE = 8  # of the memory, for freed buffers: on CUDA MLX keeps them all, and other sides have theirs


def main() -> None:
    """Serve loads until the input ends."""
    answers = private_output()
    mx.set_cache_limit(mx.get_memory_limit() // _FREED_SHARE)
    path, kind = sys.argv[1:]
    if kind == "bare":
        model, tokenizer, *_ = load(path)
        make = lambda: bare_generator(model, tokenizer)  # noqa: E731
    else:
        loaded = load_model(path)
        tokenizer = loaded.info.tokenizer
        loop = GenerationLoop(ModelContext.build(loaded, prompt_cache_bytes=0), LoopOptions())
        loop.warm(loaded.info.context_tokens)
        make = lambda: loop_generator(loop, tokenizer)  # noqa: E731
    for line in sys.stdin:
        wanted = json.loads(line)
        result = generate(make(), tokenizer, wanted["chats"], wanted["max_tokens"], wanted["arrivals"])
        print(json.dumps(dataclasses.asdict(result)), file=answers, flush=True)


def private_output() -> TextIO:
    """Standard output for answers alone; what libraries print goes to standard error."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return output


def bare_generator(model: Any, tokenizer: TokenizerWrapper) -> Generation:
    """mlx-lm's, with its own defaults."""
    generator = BatchGenerator(model, stop_tokens=[[token] for token in tokenizer.eos_token_ids])
    indexes: dict[int, int] = {}

    def insert(index: int, prompt: list[int], max_tokens: int) -> None:
        (uid,) = generator.insert([prompt], [max_tokens])
        indexes[uid] = index

    def step() -> Iterable[tuple[int, int | None, bool]]:
        for response in generator.next()[1]:
            token = None if response.finish_reason == "stop" else response.token
            yield indexes[response.uid], token, response.finish_reason is not None

    return Generation(insert, step, generator.close)


def loop_generator(loop: GenerationLoop, tokenizer: TokenizerWrapper) -> Generation:
    """This project's loop, which is idle and warm as the server's is."""
    stops = frozenset(tokenizer.eos_token_ids)

    def insert(index: int, prompt: list[int], max_tokens: int) -> None:
        greedy = SamplingParams(temperature=0.0)
        loop.submit(Submit(str(index), (), tuple(prompt), max_tokens, stops, greedy))

    def step() -> Iterable[tuple[int, int | None, bool]]:
        for name, event in loop.step():
            if isinstance(event, Failed):
                raise RuntimeError(f"request {name} failed: {event.message}")
            if isinstance(event, Token | Finished):
                ended = isinstance(event, Finished)
                yield int(name), None if ended else event.token, ended

    return Generation(insert, step, lambda: None)


def generate(
    generation: Generation,
    tokenizer: TokenizerWrapper,
    chats: Sequence[list[dict[str, str]]],
    max_tokens: Sequence[int],
    arrivals: Sequence[float],
) -> LoadResult:
    """Answer all chats greedily, each from the second on at which it arrives, in ascending order."""
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]
    coming = deque(range(len(prompts)))
    tokens: list[list[int]] = [[] for _ in prompts]
    token_seconds: list[list[float]] = [[] for _ in prompts]
    ended_seconds: dict[int, float] = {}
    start = time.perf_counter()
    while len(ended_seconds) < len(prompts):
        now = time.perf_counter() - start
        if len(coming) + len(ended_seconds) == len(prompts) and arrivals[coming[0]] > now:
            time.sleep(arrivals[coming[0]] - now)  # nothing else is there to do
            continue
        while coming and arrivals[coming[0]] <= now:
            index = coming.popleft()
            generation.insert(index, prompts[index], max_tokens[index])
        found = list(generation.step())
        now = time.perf_counter() - start
        for index, token, ended in found:
            if token is not None:
                tokens[index].append(token)
                token_seconds[index].append(now)
            if ended:
                ended_seconds[index] = now
    seconds = time.perf_counter() - start
    generation.close()
    answers = [
        Answer(
            text=tokenizer.decode(tokens[index]),
            prompt_tokens=len(prompt),
            cached_tokens=0,
            # A shorter answer ended with a stop token, which was computed too.
            completion_tokens=min(len(tokens[index]) + 1, max_tokens[index]),
            started_seconds=arrivals[index],
            text_seconds=tuple(token_seconds[index]),
            ended_seconds=ended_seconds[index],
        )
        for index, prompt in enumerate(prompts)
    ]
    return LoadResult(seconds, tuple(answers))


if __name__ == "__main__":
    main()
