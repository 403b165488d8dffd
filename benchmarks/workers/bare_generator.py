"""mlx-lm's BatchGenerator with nothing around it: what the hardware and mlx-lm give without a server.

Reads one JSON line per load from standard input and answers with one; ends with the input. The clock runs
from tokens to tokens: reading the prompts' text and writing the answers' is left out. Takes the model folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from server.blas import load_openblas

load_openblas()

from mlx_lm import load  # noqa: E402 (MLX may be imported only from here on)
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.tokenizer_utils import TokenizerWrapper  # noqa: E402

from benchmarks.load import Answer, LoadResult  # noqa: E402


def main() -> None:
    """Serve loads until the input ends."""
    answers = _private_output()
    model, tokenizer, *_ = load(sys.argv[1])
    for line in sys.stdin:
        load_of_tokens = json.loads(line)
        result = generate(model, tokenizer, load_of_tokens["chats"], load_of_tokens["max_tokens"])
        print(json.dumps(dataclasses.asdict(result)), file=answers, flush=True)


def _private_output() -> TextIO:
    """Standard output for answers alone; what libraries print goes to standard error."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return output


def generate(
    model: Any, tokenizer: TokenizerWrapper, chats: Sequence[list[dict[str, str]]], max_tokens: int
) -> LoadResult:
    """Answer all chats in one batch, greedily; a stop token is counted but is no text.

    The generator's settings are mlx-lm's own defaults, and no prompt is cached.
    """
    rows = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]
    start = time.perf_counter()
    generator = BatchGenerator(model, stop_tokens=[[token] for token in tokenizer.eos_token_ids])
    uids = generator.insert(rows, [max_tokens] * len(rows))
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    token_seconds: dict[int, list[float]] = {uid: [] for uid in uids}
    last_seconds: dict[int, float] = {}
    stopped: set[int] = set()
    while len(last_seconds) < len(uids):
        _, responses = generator.next()
        now = time.perf_counter() - start
        for response in responses:
            tokens[response.uid].append(response.token)
            token_seconds[response.uid].append(now)
            if response.finish_reason is not None:
                last_seconds[response.uid] = now
            if response.finish_reason == "stop":
                stopped.add(response.uid)
    seconds = time.perf_counter() - start
    generator.close()
    answers = [
        Answer(
            text=tokenizer.decode(tokens[uid][:-1] if uid in stopped else tokens[uid]),
            prompt_tokens=len(row),
            cached_tokens=0,
            completion_tokens=len(tokens[uid]),
            started_seconds=0.0,
            text_seconds=tuple(token_seconds[uid]),
            ended_seconds=last_seconds[uid],
        )
        for uid, row in zip(uids, rows, strict=True)
    ]
    return LoadResult(seconds, tuple(answers))


if __name__ == "__main__":
    main()
