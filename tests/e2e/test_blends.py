"""A named blend of the demo's adapters, by the command line and by the official client."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI

from tests.e2e.running import Served, run

QUESTION: Any = [{"role": "user", "content": "Where does the sun rise?"}]


def test_a_blend_answers_as_its_weights(demo: Served, client: OpenAI) -> None:
    done = run("adapters", "blend", "sailor", "pirate=0.6", "robot=0.6", "--json", url=demo.url)
    assert (done.code, done.err) == (0, "")
    made = json.loads(done.out)
    try:
        assert [part["weight"] for part in made["blend"]["parts"]] == [0.6, 0.6]
        weights = {"adapters": [{"id": "pirate", "weight": 0.6}, {"id": "robot", "weight": 0.6}]}
        named, weighted = (
            client.chat.completions.create(
                model=model, messages=QUESTION, temperature=0, max_tokens=10, logprobs=True, extra_body=extra
            ).choices[0]
            for model, extra in (("sailor", {}), ("", weights))
        )
        assert named.message.content == weighted.message.content
        assert named.logprobs is not None
        assert weighted.logprobs is not None
        pairs = zip(named.logprobs.content or [], weighted.logprobs.content or [], strict=True)
        assert max(abs(one.logprob - other.logprob) for one, other in pairs) < 1e-3

        shown = run(
            "adapters", "blend", "sailor", "pirate", "robot", "--method", "svd", "--rank", "12", "--replace",
            url=demo.url,
        )  # fmt: skip
        assert (shown.code, shown.err) == (0, "")
        assert "Blended sailor by svd: lora, ranks 8-12," in shown.out
        assert "version 2" in shown.out
        assert "Left out by its rank: " in shown.out
    finally:
        demo.ask("DELETE", "/v1/adapters/sailor")
