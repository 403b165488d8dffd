"""What KV caches take, told before a request starts; who waits for memory, who is refused, what yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from server.engine.errors import EngineMemoryError
from server.engine.kv_memory import KvMemory, KvSizes
from server.engine.loop import GenerationLoop, LoopOptions
from server.engine.messages import Finished
from server.engine.prompt_cache import PromptCache
from tests.engine.architectures import tiny_mamba
from tests.engine.engines import collect, make_engine
from tests.engine.support import loaded, make_context, prompts, run, submit, tiny_gemma
from tests.engine.test_prompt_cache import caches_for
from tests.models import tiny_llama

MODELS = pytest.mark.parametrize("make", [tiny_llama, tiny_gemma, tiny_mamba])


@MODELS
@pytest.mark.parametrize("tokens", [1, 256, 300])
def test_a_row_is_as_large_as_its_caches(make: Callable[[], nn.Module], tokens: int) -> None:
    model = make()
    caches = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches))
    held = sum(part.nbytes for part in caches)
    row_bytes = KvSizes.of(model).row(tokens)
    # A window that was read in one go is as long as what was read, until the next token.
    assert row_bytes == held if make is not tiny_gemma else 0 < row_bytes <= held


@pytest.mark.skipif(mx.metal.is_available(), reason="what Metal's attention takes besides is not estimated")
@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_needed_bounds_what_a_batch_takes(rows: int) -> None:
    model = tiny_llama(num_key_value_heads=4, head_dim=64)
    sizes = KvSizes.of(model)
    loop = GenerationLoop(make_context(model, 0), LoopOptions())
    submits = [submit(str(row), prompt, max_tokens=40) for row, prompt in enumerate(prompts([500] * rows))]
    # As many tokens as a step reads, and as many as there are to attend to.
    computing = rows * 500 * (sizes.token_bytes + sizes.score_bytes * 540)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run(loop, *submits)
    taken = mx.get_peak_memory() - before
    assert taken <= KvMemory(sizes).needed_bytes(rows, 540) + computing
    assert taken > rows * sizes.row(500)  # the figures are of this order, not of another


def test_a_request_waits_until_there_is_memory_for_it() -> None:
    model = tiny_llama()
    sizes = KvSizes.of(model)
    two_rows = KvMemory(sizes).needed_bytes(2, 64)
    memory = KvMemory(sizes, two_rows * 4 // 3)
    assert memory.fits(2, 64)
    assert not memory.fits(3, 64)
    loop = GenerationLoop(make_context(model), LoopOptions(), memory=memory)
    submits = [submit(str(row), prompt, max_tokens=8) for row, prompt in enumerate(prompts([20] * 5))]
    for one in submits:
        loop.submit(one)
    most = 0
    ends = []
    while not loop.idle:
        ends += [event for _, event in loop.step() if isinstance(event, Finished)]
        most = max(most, loop.stats.running_requests)
    assert most == 2
    assert len(ends) == 5


def test_little_memory_changes_no_token() -> None:
    model = tiny_llama()
    submits = [submit(str(row), prompt) for row, prompt in enumerate(prompts([200, 31, 64]))]
    plain = run(GenerationLoop(make_context(model), LoopOptions()), *submits)
    sizes = KvSizes.of(model)
    tight = KvMemory(sizes, KvMemory(sizes).needed_bytes(1, 208) * 4 // 3 + 4)
    assert tight.most_read_tokens(208) is not None
    narrow = run(GenerationLoop(make_context(model), LoopOptions(), memory=tight), *submits)
    for one in submits:
        assert narrow.tokens(one.request_id) == plain.tokens(one.request_id)


def test_kept_prompts_yield_to_running_requests() -> None:
    model = tiny_llama()
    sizes = KvSizes.of(model)
    context = make_context(model)
    first, second = prompts([200, 200])
    memory = KvMemory(sizes, KvMemory(sizes).needed_bytes(3, 208) * 4 // 3)
    loop = GenerationLoop(context, LoopOptions(), memory=memory)
    run(loop, submit("a", first))
    held = context.prompt_cache.stats.bytes_held
    assert held > 0
    loop.submit(submit("b", second, choices=3, max_tokens=500))
    loop.step()
    assert context.prompt_cache.stats.bytes_held == 0
    run(loop)
    assert context.prompt_cache.stats.evictions > 0


def test_the_room_of_kept_prompts_shrinks_and_grows_again() -> None:
    kept = PromptCache(1 << 20)
    size = sum(part.nbytes for part in caches_for([1, 2, 3]))
    kept.store("a", [1, 2, 3], caches_for([1, 2, 3]))
    kept.store("b", [1, 2, 3], caches_for([1, 2, 3]))
    kept.leave_room(size)
    assert (kept.stats.entries, kept.stats.evictions) == (1, 1)
    kept.store("c", [4, 5, 6], caches_for([4, 5, 6]))
    assert kept.stats.entries == 1
    kept.leave_room(1 << 30)
    kept.store("d", [7, 8, 9], caches_for([7, 8, 9]))
    assert kept.stats.entries == 2


async def test_a_request_that_can_never_fit_is_refused() -> None:
    model = tiny_llama()
    limit_bytes = KvMemory(KvSizes.of(model)).needed_bytes(1, 64) * 4 // 3
    plain = loaded(model)
    sized = replace(plain, info=replace(plain.info, kv_sizes=KvSizes.of(model)))
    engine = make_engine(lambda: sized, memory_limit=lambda: limit_bytes)
    await engine.start()
    try:
        with pytest.raises(EngineMemoryError, match="2 x 40 tokens"):
            engine.generate(submit("two", [1] * 20, max_tokens=20, choices=2))
        assert isinstance((await collect(engine.generate(submit("one", [1] * 20))))[-1], Finished)
    finally:
        await engine.stop(0.0)
