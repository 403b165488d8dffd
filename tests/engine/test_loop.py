"""The generation loop, driven by hand: its tokens are mlx-lm's own, and every request ends exactly once."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tuner.utils import load_adapters

from adapters_core.container import AdapterContainer
from adapters_core.mixed.residents import RowAdapters
from server.engine.context import ModelContext
from server.engine.errors import EngineStoppedError, InvalidSubmitError
from server.engine.loop import GenerationLoop
from server.engine.messages import Cancel, ChoiceFinished, Failed, Finished, SamplingParams, Update
from tests.engine.support import (
    GREEDY,
    CountingModel,
    FickleCaches,
    Poisoned,
    Transcript,
    prompts,
    reference,
    run,
    small_loop,
    submit,
    tiny_gemma,
)
from tests.models import make_adapter, tiny_llama

LENGTHS = [1, 2, 40, 17, 3, 9, 33, 5]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
@pytest.mark.parametrize("prompt_cache_bytes", [0, 1 << 24])
def test_batched_tokens_are_those_of_one_at_a_time(make: Any, prompt_cache_bytes: int) -> None:
    model = make()
    loop = small_loop(model, prompt_cache_bytes=prompt_cache_bytes)
    requests = {f"r{i}": prompt for i, prompt in enumerate(prompts(LENGTHS))}
    transcript = run(loop, *(submit(name, prompt, 12) for name, prompt in requests.items()))
    for name, prompt in requests.items():
        assert transcript.tokens(name) == reference(model, prompt, 12)
        assert transcript.finish(name) == ChoiceFinished(0, "length", 12)
        assert isinstance(transcript.end(name), Finished)
    assert loop.stats.completion_tokens == 12 * len(requests)
    assert loop.stats.prompt_tokens == sum(LENGTHS)


def test_rows_with_different_adapters_share_a_batch_and_keep_apart(tmp_path: Path) -> None:
    loop = small_loop(tiny_llama())
    context = context_of(loop)
    (prompt,) = prompts([21])
    rows: dict[str, RowAdapters] = {"base": ()}
    expected = {"base": reference(tiny_llama(), prompt, 6)}
    for seed, kind in [(1, "lora"), (2, "dora"), (3, "lora")]:
        name = f"{kind}{seed}"
        folder = make_adapter(tmp_path / name, tiny_llama(), kind, seed=seed, rank=2 + seed)
        rows[name] = ((context.bank.add(AdapterContainer.from_directory(folder)), 1.0),)
        adapted = load_adapters(tiny_llama(), str(folder))
        adapted.eval()
        expected[name] = reference(adapted, prompt, 6)
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)

    for round_number in range(2):  # in the second, every prompt is found in the cache, each under its own key
        submits = [submit(f"{name} {round_number}", prompt, 6, row=row) for name, row in rows.items()]
        transcript = run(loop, *submits)
        for name, tokens in expected.items():
            assert transcript.tokens(f"{name} {round_number}") == tokens
            assert transcript.end(f"{name} {round_number}") == Finished(0 if round_number == 0 else 20)


def context_of(loop: GenerationLoop) -> ModelContext:
    """The loop's context, by the way that everyone has to go."""
    future: Future[Any] = Future()
    loop.update(Update(lambda context: context, future))
    loop.step()
    return future.result(timeout=0)


def test_a_stop_token_ends_a_row_unsent_and_is_counted() -> None:
    model = tiny_llama()
    prompt = prompts([7])[0]
    answer = reference(model, prompt, 10)
    stop = answer[4]
    before = answer[: answer.index(stop)]
    transcript = run(small_loop(model), submit("r", prompt, 10, stop_token_ids=frozenset({stop, 95})))
    assert transcript.tokens("r") == before
    assert transcript.finish("r") == ChoiceFinished(0, "stop", len(before) + 1)


def test_the_choices_of_a_request_read_its_prompt_once() -> None:
    model = tiny_llama()
    (prompt,) = prompts([30])
    read: list[int] = []
    loop = small_loop(CountingModel(model, read), max_batch_size=8)
    transcript = run(loop, submit("r", prompt, 5, choices=5))
    for choice in range(5):
        assert transcript.tokens("r", choice) == reference(model, prompt, 5)
        assert transcript.finish("r", choice) == ChoiceFinished(choice, "length", 5)
    assert isinstance(transcript.end("r"), Finished)
    # All but the prompt's last token once; then that token and the 5 generated ones in each of 5 rows.
    assert sum(read) == 29 + 5 * 6


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_more_choices_than_rows_are_all_computed(make: Any, length: int) -> None:
    model = make()
    (prompt,) = prompts([length])
    transcript = run(small_loop(model), submit("r", prompt, 4, choices=11), submit("after", prompt, 4))
    for choice in range(11):
        assert transcript.tokens("r", choice) == reference(model, prompt, 4)
    assert transcript.tokens("after") == reference(model, prompt, 4)


def test_requests_start_in_their_order_and_never_more_rows_than_allowed() -> None:
    loop = small_loop(tiny_llama())
    for name, choices in [("a", 2), ("b", 3), ("c", 1)]:
        loop.submit(submit(name, [1, 2, 3], 6, choices=choices))
    transcript, first_token = Transcript(), dict[str, None]()
    while not loop.idle:
        events = loop.step()
        transcript.add(events)
        first_token.update(dict.fromkeys(name for name, _ in events))
        assert loop.stats.running_rows <= 4
    assert list(first_token) == ["a", "b", "c"]  # c would fit beside a, but does not overtake b


def test_a_request_id_in_use_is_refused() -> None:
    loop = small_loop(tiny_llama())
    loop.submit(submit("r", [1, 2]))
    with pytest.raises(InvalidSubmitError, match="'r' is in use"):
        loop.submit(submit("r", [3]))
    run(loop)
    assert run(loop, submit("r", [3])).tokens("r")


# Cancelling


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 8, 11])
def test_cancelling_at_any_moment_ends_the_request_and_spares_the_others(steps: int) -> None:
    model = tiny_llama()
    gone, kept, late = prompts([25, 14, 6], seed=4)
    loop = small_loop(model, max_batch_size=3)
    transcript = Transcript()
    for one in (submit("kept", kept, 8), submit("gone", gone, 8, choices=2), submit("late", late, 8)):
        loop.submit(one)
    for _ in range(steps):
        transcript.add(loop.step())
    loop.cancel(Cancel("gone"))
    run(loop, transcript=transcript)
    assert isinstance(transcript.end("gone"), Finished)
    expected = reference(model, gone, 8)
    for choice in range(2):
        sent = transcript.tokens("gone", choice)
        assert sent == expected[: len(sent)]
        assert transcript.finish("gone", choice) == ChoiceFinished(choice, "stop", len(sent))
    assert transcript.tokens("kept") == reference(model, kept, 8)
    assert transcript.tokens("late") == reference(model, late, 8)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("choice", [0, 1])
def test_cancelling_one_choice_at_any_moment_spares_the_others(steps: int, choice: int) -> None:
    model = tiny_llama()
    (prompt,) = prompts([25])
    loop = small_loop(model)
    transcript = Transcript()
    loop.submit(submit("r", prompt, 8, choices=3))
    for _ in range(steps):
        transcript.add(loop.step())
    loop.cancel(Cancel("r", choice))
    loop.cancel(Cancel("r", choice))
    run(loop, transcript=transcript)
    expected = reference(model, prompt, 8)
    for other in {0, 1, 2} - {choice}:
        assert transcript.tokens("r", other) == expected
        assert transcript.finish("r", other).reason == "length"
    sent = transcript.tokens("r", choice)
    assert sent == expected[: len(sent)]
    assert transcript.finish("r", choice) == ChoiceFinished(choice, "stop", len(sent))


def test_cancelling_every_choice_one_by_one_ends_the_request() -> None:
    loop = small_loop(tiny_llama())
    loop.submit(submit("r", prompts([25])[0], 8, choices=3))
    transcript = Transcript()
    transcript.add(loop.step())
    for choice in range(3):
        loop.cancel(Cancel("r", choice))
    transcript.add(loop.step())
    assert isinstance(transcript.end("r"), Finished)
    assert loop.idle
    assert loop.stats.running_rows == 0


def test_cancelling_what_is_not_there_does_nothing() -> None:
    loop = small_loop(tiny_llama())
    loop.cancel(Cancel("nobody"))
    loop.cancel(Cancel("nobody", 3))
    assert loop.idle
    loop.submit(submit("r", [1, 2], 2))
    loop.cancel(Cancel("r", 7))
    assert len(run(loop).tokens("r")) == 2


# Updates


def test_updates_run_in_order_between_steps_and_their_errors_go_to_their_callers() -> None:
    loop = small_loop(tiny_llama())
    ran: list[str] = []
    futures: dict[str, Future[Any]] = {name: Future() for name in ("first", "wrong", "stop", "last")}

    def note(name: str) -> Any:
        return lambda context: ran.append(name) or name

    loop.submit(submit("r", [1, 2, 3], 4))
    loop.step()
    loop.update(Update(note("first"), futures["first"]))
    loop.update(Update(lambda context: 1 // 0, futures["wrong"]))
    loop.update(Update(lambda context: next(iter(())), futures["stop"]))
    loop.update(Update(note("last"), futures["last"]))
    transcript = run(loop)
    assert ran == ["first", "last"]
    assert futures["first"].result(timeout=0) == "first"
    assert isinstance(futures["wrong"].exception(timeout=0), ZeroDivisionError)
    assert isinstance(futures["stop"].exception(timeout=0), RuntimeError)
    assert transcript.tokens("r") == reference(tiny_llama(), [1, 2, 3], 4)


def test_a_draining_update_lets_rows_finish_and_admits_nobody_before_it_has_run() -> None:
    model = tiny_llama()
    loop = small_loop(model)
    seen: list[tuple[str, int, int]] = []

    def look(name: str) -> Any:
        return lambda context: seen.append((name, loop.stats.running_rows, loop.stats.waiting_requests))

    loop.submit(submit("running", [1, 2, 3], 6))
    transcript = Transcript()
    transcript.add(loop.step())
    loop.submit(submit("waiting", [4, 5, 6], 6))
    drain: Future[Any] = Future()
    loop.update(Update(look("drained"), drain, drain=True))
    loop.update(Update(look("behind it"), Future()))
    run(loop, transcript=transcript)
    assert seen == [("drained", 0, 1), ("behind it", 0, 1)]
    assert transcript.tokens("running") == reference(model, [1, 2, 3], 6)
    assert transcript.tokens("waiting") == reference(model, [4, 5, 6], 6)


def test_a_draining_update_on_an_empty_batch_runs_at_once() -> None:
    loop = small_loop(tiny_llama())
    future: Future[Any] = Future()
    loop.update(Update(lambda context: context.digest, future, drain=True))
    loop.step()
    assert future.result(timeout=0) == "sha256:tiny"


# Failures


@pytest.mark.parametrize("where", [0, 20, -1])
def test_a_forward_that_raises_fails_its_batch_and_the_loop_goes_on(where: int) -> None:
    model = tiny_llama()
    sound, poisoned, later = prompts([9, 30, 12], seed=5)
    sound, later = [t % 90 for t in sound], [t % 90 for t in later]
    poisoned = [t % 90 for t in poisoned]
    poisoned[where] = Poisoned.token
    loop = small_loop(Poisoned(model), max_batch_size=2)
    mute = SamplingParams(temperature=0.0, logit_bias=((Poisoned.token, -1e9),))
    transcript = run(
        loop,
        submit("beside", sound, 20, sampling=mute),
        submit("poisoned", poisoned, 4),
        submit("later", later, 4, sampling=mute),
    )
    end = transcript.end("poisoned")
    assert isinstance(end, Failed)
    assert "poison" not in end.message
    assert transcript.end("beside") == end
    assert isinstance(transcript.end("later"), Finished)
    assert len(transcript.tokens("later")) == 4
    assert loop.stats.failures == 2
    assert loop.stats.running_rows == 0


def test_a_request_that_cannot_start_fails_alone() -> None:
    model = tiny_llama()
    loop = small_loop(model)
    wrong = SamplingParams(temperature=0.0, repetition_penalty=-1.0)
    transcript = run(
        loop, submit("good", [1, 2], 4), submit("bad", [3], sampling=wrong), submit("next", [4], 4)
    )
    assert isinstance(transcript.end("bad"), Failed)
    assert transcript.tokens("good") == reference(model, [1, 2], 4)
    assert transcript.tokens("next") == reference(model, [4], 4)
    assert loop.stats.failures == 1


def test_a_request_that_fails_when_its_rows_are_in_the_batch_takes_them_with_it() -> None:
    broken: list[bool] = []
    model = tiny_llama()
    loop = small_loop(FickleCaches(model, broken))
    loop.submit(submit("good", [1, 2, 3], 6))
    transcript = Transcript()
    transcript.add(loop.step())
    broken.append(True)
    loop.submit(submit("bad", [4, 5, 6], 6))
    transcript.add(loop.step())
    assert isinstance(transcript.end("bad"), Failed)
    broken.clear()
    run(loop, submit("next", [7, 8, 9], 6), transcript=transcript)
    for name, prompt in {"good": [1, 2, 3], "next": [7, 8, 9]}.items():
        assert transcript.tokens(name) == reference(model, prompt, 6)
    assert loop.stats.failures == 1


def test_fail_all_ends_everything_and_nothing_more_is_said() -> None:
    loop = small_loop(tiny_llama(), max_batch_size=1, prefill_batch_size=1)
    loop.submit(submit("running", [1, 2], 50))
    loop.submit(submit("waiting", [3], 50))
    transcript = Transcript()
    for _ in range(4):
        transcript.add(loop.step())
    future: Future[Any] = Future()
    loop.update(Update(lambda context: None, future, drain=True))
    transcript.add(loop.fail_all("gone", EngineStoppedError("gone")))
    assert transcript.end("running") == transcript.end("waiting") == Failed("gone", "stopped")
    assert isinstance(future.exception(timeout=0), EngineStoppedError)
    assert loop.idle


def test_greedy_requests_beside_sampled_ones_are_unchanged() -> None:
    model = tiny_llama()
    loop = small_loop(model)
    warm = SamplingParams(temperature=1.3, top_p=0.9, top_k=40, seed=1)
    transcript = run(
        loop, submit("greedy", [5, 6, 7], 10, sampling=GREEDY), submit("warm", [5, 6, 7], 10, sampling=warm)
    )
    assert transcript.tokens("greedy") == reference(model, [5, 6, 7], 10)
    assert transcript.tokens("warm") != transcript.tokens("greedy")
