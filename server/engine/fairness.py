"""Who is served next: waiting requests, fair between what they are computed with.

The Virtual Token Counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024,
arXiv:2401.00588, algorithm 2): every key has a counter of the service that it has had, and the key with the
smallest counter is next. Within a key: first come, first served. Knows nothing of models, rows or time. Runs
on the generation thread.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

__all__ = ["INPUT_WEIGHT", "MAX_STARTS_OF_OTHERS", "OUTPUT_WEIGHT", "FairQueue"]

T = TypeVar("T")

# The paper's weights of a token that is read and of one that is generated.
INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2

# The paper has a fixed set of keys. Where new ones keep coming, all with the smallest counter, a key that has
# been served would never be next again; so it is after so many starts of others.
MAX_STARTS_OF_OTHERS = 256


class _Share:
    """A key that is waiting or running: the service it has had, its waiting ids, its running requests.

    `since` is how many requests had been started when it was started last, or began to wait.
    """

    __slots__ = ("counter", "running", "served", "since", "waiting")

    def __init__(self) -> None:
        self.counter = 0
        self.waiting: OrderedDict[str, int] = OrderedDict()  # request id: number of its arrival
        self.running = 0
        self.served = False
        self.since = 0


class FairQueue(Generic[T]):
    """Waiting requests by id and by key, with a counter of service for each key.

    A key that begins to wait is lifted to the smallest counter of those that wait (or to that of the key
    which was started last), so that nobody saves up service while idle; among equals, it is the next. A key
    with neither waiting nor running requests is forgotten. Looking up and removing take the same time however
    many wait; pushing and `heads` look at the keys, not at the requests.
    """

    def __init__(self) -> None:
        self._items: dict[str, tuple[Hashable, T]] = {}
        self._shares: dict[Hashable, _Share] = {}
        self._waiting_keys: dict[Hashable, None] = {}
        self._arrivals = count()
        self._starts = 0
        self._last_key: Hashable = None
        self._last_counter = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        """All that wait, in the order of their arrival."""
        return (item for _, item in self._items.values())

    def get(self, request_id: str) -> T | None:
        """The waiting request of that id."""
        found = self._items.get(request_id)
        return None if found is None else found[1]

    def push(self, key: Hashable, request_id: str, item: T) -> None:
        """Let a request wait; its id must be new."""
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = _Share()
        if not share.waiting:
            share.counter = max(share.counter, self._floor())
            share.since = self._starts
            self._waiting_keys[key] = None
        share.waiting[request_id] = next(self._arrivals)
        self._items[request_id] = (key, item)

    def _floor(self) -> int:
        if not self._waiting_keys:
            return self._last_counter
        return min(self._shares[key].counter for key in self._waiting_keys)

    def remove(self, request_id: str) -> T:
        """Take a request out that will not be served.

        Raises:
            KeyError: it does not wait.
        """
        key, item = self._items[request_id]
        self._leave(key, request_id)
        self._forget_idle(key)
        return item

    def start(self, request_id: str, read_tokens: int) -> T:
        """Take a request out that is served from now on, and charge its key for the tokens to be read.

        Raises:
            KeyError: it does not wait.
        """
        key, item = self._items[request_id]
        self._leave(key, request_id)
        self._starts += 1
        share = self._shares[key]
        share.running += 1
        share.served, share.since = True, self._starts
        self._last_key, self._last_counter = key, share.counter
        self._charge(key, INPUT_WEIGHT * read_tokens)
        return item

    def charge_output(self, key: Hashable, tokens: int) -> None:
        """Charge a running key for tokens that were generated."""
        self._charge(key, OUTPUT_WEIGHT * tokens)

    def end(self, key: Hashable) -> None:
        """A started request of `key` is over."""
        self._shares[key].running -= 1
        self._forget_idle(key)

    def heads(self, passed: Container[str] = ()) -> Iterator[T]:
        """Each key's first request, the least served key's first, equals by arrival.

        Keys that others have been preferred to for too long come before that.

        The caller may start what it is given, or put its id into `passed`: then that key's next request comes
        in its turn. What it does neither with is not given again, nor are the later ones of its key.
        """
        heap = [self._place(key) for key in self._waiting_keys]
        heapq.heapify(heap)
        while heap:
            *_, key = heapq.heappop(heap)
            waiting = self._shares[key].waiting
            request_id = next((each for each in waiting if each not in passed), None)
            if request_id is None:
                continue
            yield self._items[request_id][1]
            if (request_id not in self._items or request_id in passed) and key in self._waiting_keys:
                heapq.heappush(heap, self._place(key))

    def _place(self, key: Hashable) -> tuple[bool, int, bool, int, Hashable]:
        """No two keys have the same number of arrival, so that keys themselves are never compared."""
        share = self._shares[key]
        patient = self._starts - share.since < MAX_STARTS_OF_OTHERS
        arrival = next(iter(share.waiting.values()))
        return patient, share.counter if patient else share.since, share.served, arrival, key

    def _charge(self, key: Hashable, amount: int) -> None:
        share = self._shares[key]
        share.counter += amount
        if key == self._last_key:
            self._last_counter = share.counter

    def _leave(self, key: Hashable, request_id: str) -> None:
        del self._items[request_id]
        share = self._shares[key]
        del share.waiting[request_id]
        if not share.waiting:
            del self._waiting_keys[key]

    def _forget_idle(self, key: Hashable) -> None:
        share = self._shares[key]
        if not share.waiting and share.running == 0:
            del self._shares[key]
        if not self._shares:  # nobody left to be compared with
            self._last_key, self._last_counter = None, 0
