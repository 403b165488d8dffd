"""mlx-lm's own greedy answers, one request and one adapter at a time: `python -m tests.e2e.reference`.

A process of its own, so that its threads are few and its memory is given back. Reads a JSON object from
standard input and writes one to standard output: for each name its questions; for each name its answers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from server.blas import load_openblas

load_openblas()

import mlx_lm  # noqa: E402 (MLX may be imported only from here on)


def answers(model_path: str, adapter_path: str | None, questions: list[str], max_tokens: int) -> list[Any]:
    """For each question the text, and the text of each token by itself."""
    model, tokenizer, *_ = mlx_lm.load(model_path, adapter_path=adapter_path)
    found = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        # Without a sampler mlx-lm takes the likeliest token.
        parts = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=max_tokens))
        tokens = [part.token for part in parts if part.token not in tokenizer.eos_token_ids]
        texts = [tokenizer.decode([token]) for token in tokens]
        found.append(["".join(part.text for part in parts), texts])
    return found


def main() -> None:
    given = json.load(sys.stdin)
    results = {
        name: answers(given["model"], given["adapters"].get(name), questions, given["max_tokens"])
        for name, questions in given["questions"].items()
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
