"""How prompts are read, on a simulated clock: the real schedule over models that cost what the test says."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from server.engine.messages import Submit
from server.engine.pacing import Pace
from server.engine.prompt_cache import PromptMatch
from server.engine.requests import Reading, Request
from server.engine.scheduler import LoopOptions, Scheduler, StepWork

BOUND = 0.92
WAIT = 6
FIXED_BUDGETS = (64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Costs:
    """Seconds of a forward that reads, `read_fixed` and for each token, and of one that decodes."""

    read_fixed: float
    read_token: float
    fixed: float
    row: float

    def reading(self, tokens: int) -> float:
        return self.read_fixed + self.read_token * tokens if tokens else 0.0

    def decoding(self, rows: int) -> float:
        return self.fixed + self.row * rows if rows else 0.0


class FixedPace(Pace):
    """Reads so many tokens in every step, whatever that takes."""

    def __init__(self, tokens: int) -> None:
        super().__init__(min_tokens=1, max_tokens=tokens)
        self._tokens = tokens

    def budget_tokens(self, left_tokens: object, decoding_rows: int) -> int:
        return self._tokens

    @property
    def idle_tokens(self) -> int:
        return self._tokens


class Simulation:
    """Requests by the time at which they come, through a scheduler; `first` and `gaps` are in seconds."""

    def __init__(self, costs: Costs, pace: Pace | None = None) -> None:
        self.costs, self.now, self.uid = costs, 0.0, 0
        self.scheduler = Scheduler(LoopOptions())
        self.scheduler.pace = pace or self.scheduler.pace
        self.first: dict[str, float] = {}
        self.gaps: list[float] = []
        self._joining: set[int] = set()  # rows whose prompt was read in the step before

    def run(self, name: str, requests: list[tuple[float, int, int]]) -> float:
        """Seconds for all (when, prompt tokens, answer tokens), sorted by when, from now on."""
        start, number = self.now, 0
        left: dict[str, int] = {}
        came: dict[str, float] = {}
        while number < len(requests) or self.scheduler.running or self.scheduler.waiting:
            if not (self.scheduler.running or self.scheduler.waiting):
                self.now = max(self.now, start + requests[number][0])
            while number < len(requests) and start + requests[number][0] <= self.now:
                when, prompt, answer = requests[number]
                one, number = f"{name}{number}", number + 1
                self.uid += prompt
                tokens = tuple(range(self.uid, self.uid + prompt))
                self.scheduler.submit(Request.of(Submit(one, (), tokens, answer, frozenset()), seed=0))
                left[one], came[one] = answer, start + when
            self._step(left, came)
        return self.now - start

    def _step(self, left: dict[str, int], came: dict[str, float]) -> None:
        scheduler = self.scheduler
        for one in scheduler.admissible(lambda _: PromptMatch(0)):
            tokens = len(one.submit.prompt_tokens) - 1
            scheduler.start(one, tokens)
            self.uid += 1
            one.uids[0] = self.uid
            scheduler.reading[self.uid] = Reading(one, 0, [tokens], kept=False, anywhere=True, padded=True)
        rows = {one.uids[0]: one for one in scheduler.running.values()}
        joining, self._joining = self._joining & rows.keys(), set()
        decoding = [one for uid, one in rows.items() if uid not in joining and uid not in scheduler.reading]
        step_tokens = scheduler.step_tokens()
        lengths = [min(reading.left_tokens, step_tokens) for reading in scheduler.reading.values()]
        read = len(lengths) * max(lengths, default=0)
        costs = self.costs
        seconds = costs.decoding(len(decoding)) + costs.decoding(len(joining)) + costs.reading(read)
        self.now += seconds
        for uid, reading in list(scheduler.reading.items()):
            reading.advance(min(reading.left_tokens, step_tokens))
            if not reading.segments:
                del scheduler.reading[uid]
                self._joining.add(uid)
        for one in decoding:
            self.first.setdefault(one.request_id, self.now - came[one.request_id])
            self.gaps.append(seconds)
            left[one.request_id] -= 1
            if left[one.request_id] == 0:
                scheduler.end(one)
        scheduler.observe(
            StepWork(seconds, decoded_rows=len(decoding), joined_rows=len(joining), read_tokens=read)
        )


COSTS = st.builds(
    Costs,
    read_fixed=st.floats(0, 0.3),
    read_token=st.floats(-5, -2).map(lambda power: 10.0**power),
    fixed=st.floats(0.002, 0.05),
    row=st.floats(-5, -2).map(lambda power: 10.0**power),
)
WARM_UP = [(0.0, length, 12) for length in (20, 60, 200, 600)] + [(0.1, length, 12) for length in (40, 300)]


def traffic(random: Random, gap: float) -> list[tuple[float, int, int]]:
    return [(number * gap, random.randint(30, 600), 128) for number in range(48)]


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(COSTS, st.sampled_from([0.0, 0.02, 0.2]), st.randoms(use_true_random=False))
def test_reading_keeps_the_best_fixed_budgets_throughput_whatever_a_forward_costs(
    costs: Costs, gap: float, random: Random
) -> None:
    requests = traffic(random, gap)
    ours = Simulation(costs)
    ours.run("warm", WARM_UP)
    seconds = ours.run("r", requests)
    best = min(Simulation(costs, FixedPace(tokens)).run("r", requests) for tokens in FIXED_BUDGETS)
    assert best / seconds >= BOUND, (best / seconds, costs, gap)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(COSTS, st.integers(1, 31), st.integers(30, 2000))
def test_a_request_waits_for_a_bounded_multiple_of_its_own_cost(costs: Costs, rows: int, prompt: int) -> None:
    simulation = Simulation(costs)
    simulation.run("warm", WARM_UP)
    others = [(0.0, 30, 2000) for _ in range(rows)]
    when = sum(costs.reading(30) + costs.decoding(number) for number in range(rows)) + 10 * costs.fixed
    simulation.run("r", [*others, (when, prompt, 2)])
    own = costs.reading(prompt) + costs.decoding(rows)
    assert simulation.first[f"r{rows}"] <= WAIT * own, (simulation.first[f"r{rows}"] / own, costs)


@pytest.mark.parametrize("gap", [0.0, 0.02])
@pytest.mark.parametrize("fixed", [0.0, 0.01])
def test_reading_costs_little_throughput_where_forwards_cost_about_as_much_as_decoding(
    fixed: float, gap: float
) -> None:
    costs = Costs(fixed, 2.5e-5, 0.009, 5e-5)
    requests = traffic(Random(0), gap)
    ours = Simulation(costs)
    ours.run("warm", WARM_UP)
    seconds = ours.run("r", requests)
    best = min(Simulation(costs, FixedPace(tokens)).run("r", requests) for tokens in FIXED_BUDGETS)
    assert best / seconds >= 0.95
