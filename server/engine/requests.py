"""A request on the generation thread, from its Submit or Scoring to its end. State only; no rules."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import accumulate

from adapters_core.mixed.residents import ResidentAdapter, row_key

from .messages import Scoring, Submit
from .prefixes import TokenText, common_tokens

__all__ = ["Reading", "Request"]


@dataclass(slots=True, eq=False)
class Request:
    """`share` is whom its service is charged to, `key` what its KV caches are computed with (once looked up).

    `open`: choices that are not finished, or answers that are not scored. `pending`: those of them that wait
    while another choice's row reads the prompt for all. `uids`: the generator's rows by choice. `overtaken`:
    requests that were started while this one was next but did not fit.
    """

    submit: Submit | Scoring
    seed: int
    text: TokenText
    share: Hashable
    adapters: frozenset[ResidentAdapter]
    key: Hashable = None
    cached_tokens: int = 0
    overtaken: int = 0
    open: set[int] = field(default_factory=set)
    pending: set[int] = field(default_factory=set)
    uids: dict[int, int] = field(default_factory=dict)
    completion_tokens: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, submit: Submit | Scoring, seed: int = 0) -> Request:
        """The request as it begins to wait."""
        return cls(
            submit,
            seed,
            TokenText.of(submit.prompt_tokens),
            row_key(submit.row),
            frozenset(adapter for adapter, _ in submit.row),
            open=set(range(submit.choices)),
        )

    @property
    def request_id(self) -> str:
        """The id that it was submitted with."""
        return self.submit.request_id

    @property
    def is_scoring(self) -> bool:
        """Whether its tokens are given, and scored, rather than generated."""
        return isinstance(self.submit, Scoring)

    @property
    def generated(self) -> Submit:
        """What is asked of a request that generates. Raises TypeError for one that scores."""
        if isinstance(self.submit, Scoring):
            raise TypeError(f"request {self.request_id!r} generates nothing")
        return self.submit

    @property
    def scoring(self) -> Scoring:
        """What is asked of a request that scores. Raises TypeError for one that generates."""
        if isinstance(self.submit, Submit):
            raise TypeError(f"request {self.request_id!r} scores nothing")
        return self.submit


@dataclass(slots=True)
class Reading:
    """A row whose prompt is being read: how far, and the lengths of the segments ahead.

    The prompt's last token is in no segment: computing it starts the answer. `kept`: whether others can have
    its caches at all. `anywhere`: caches kept at one place serve every beginning; otherwise they serve from
    the ends of segments alone. `padded`: whether it may be read beside longer ones. `wanted`: the place from
    which on a waiting request could start with this row's caches.
    """

    request: Request
    position: int
    segments: list[int]
    kept: bool
    anywhere: bool
    padded: bool
    wanted: int | None = None

    @property
    def left_tokens(self) -> int:
        """What a step can read of it at most; never 0."""
        return self.segments[0]

    def advance(self, read_tokens: int) -> bool:
        """Some tokens of the first segment have been read; whether that ended it."""
        self.position += read_tokens
        self.segments[0] -= read_tokens
        if self.segments[0] == 0:
            self.segments.pop(0)
            return True
        return False

    def will_serve(self, text: TokenText) -> int:
        """Of how many of the first tokens of `text` this row will have caches to start from."""
        if not self.kept:
            return 0
        shared = min(common_tokens(self.request.text, text), text.tokens - 1)
        if self.anywhere:
            return min(shared, self.position + sum(self.segments))
        ends = accumulate(self.segments, initial=self.position)
        return max((end for end in ends if end <= shared), default=0)
