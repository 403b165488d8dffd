"""A client that guesses another's prompt by what `usage` and time tell of the prompt cache.

    python -m tests.api.spy --requests 2000

Half of the guesses are at a prompt that another owner sent before, half at one that nobody sent. Prints what
both were told, for owners that share a cache (no salt) and for owners with salts of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from tests.api.parrot import load_parrot
from tests.api.serving import Service, serving

SECRET = [4, 2, 7, 1]


async def guess(service: Service, prompt: list[int], fields: dict[str, str]) -> tuple[int, float]:
    """How many tokens were cached, and how many milliseconds it took."""
    began = time.perf_counter()
    answer = await service.complete(prompt, max_tokens=1, **fields)
    milliseconds = (time.perf_counter() - began) * 1000
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], milliseconds


async def main() -> None:
    """Ask, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    requests = parser.parse_args().requests
    for owner, spy in (({}, {}), ({"cache_salt": "owner"}, {"cache_salt": "spy"})):
        async with serving(load_parrot(), log_level="error") as service:
            watched, untouched = [6] * 200, [11] * 200
            await service.complete([*watched, *SECRET, 5], max_tokens=1, **owner)
            told: list[tuple[list[tuple[int, float]], list[int]]] = [([], watched), ([], untouched)]
            for index in range(requests // 2):
                known, digit = SECRET[: index // 10 % len(SECRET)], index % 10
                for answers, start in told:
                    prompt = [*start, *known, digit, 90 + index // 40 % 100]
                    answers.append(await guess(service, prompt, spy))
        (at_secret, _), (at_nothing, _) = told
        differing = sum(a[0] != b[0] for a, b in zip(at_secret, at_nothing, strict=True))
        medians = [statistics.median(one[1] for one in answers) for answers, _ in told]
        print(
            f"{'salts' if spy else 'no salts'}: {requests} requests; {differing} of {requests // 2} guesses "
            f"at the secret were told another count; median {medians[0]:.2f} and {medians[1]:.2f} ms"
        )


if __name__ == "__main__":
    asyncio.run(main())
