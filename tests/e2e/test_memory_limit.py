"""A process with little memory: what fits is answered, what can never fit is refused, and it lives on."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import error_of, serving
from tests.engine.test_load_model import write_model
from tests.models import tiny_llama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce ulimit -d")

WIDE: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "num_hidden_layers": 4,
}
"""65 kB of KV caches for each token."""
LIMIT_KIB = 900 * 1024
PROMPT_TOKENS = 800


def test_requests_wait_for_memory_instead_of_ending_the_process(tmp_path: Path) -> None:
    model = write_model(tmp_path / "wide", tiny_llama(**WIDE), **WIDE, max_position_embeddings=65536)
    with serving(tmp_path / "log", "serve", str(model), limits=f"-d {LIMIT_KIB}") as server:

        def complete(first: int, **fields: Any) -> Any:
            body = {
                "prompt": [first, *[5] * (PROMPT_TOKENS - 1)],
                "max_tokens": 4,
                "temperature": 0,
                **fields,
            }
            return server.http.post("/v1/completions", json=body)

        with ThreadPoolExecutor(8) as threads:
            replies = list(threads.map(complete, range(8)))
        assert [reply.status_code for reply in replies] == [200] * 8
        refused = complete(9, max_tokens=30_000)
        assert refused.status_code == 503
        assert error_of(refused.json())["code"] == "kv_memory_exceeded"
        assert refused.headers["x-should-retry"] == "false"
        assert complete(9).status_code == 200
