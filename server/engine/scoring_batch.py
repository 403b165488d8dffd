"""The rows whose tokens are given and scored: log-probabilities of answers, read in bounded pieces.

Each answer is a row that is fed its tokens, as a prompt is read, and whose logits are looked at for the
token that comes next. Rows of any requests and adapters share a forward. Of a piece's logits only the wanted
log-probabilities are kept, so that no array is larger than a piece times the vocabulary. Knows no schedule
and no events; runs on the generation thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from adapters_core.mixed.routing import RoutedModel

from .pacing import first_read
from .requests import Request

__all__ = ["ReadPrompt", "ScoredAnswer", "ScoringBatch", "ScoringStep"]

# A row of a request that has others in the batch joins only for a share of a forward that is worth it.
_MIN_SHARE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """The natural log-probabilities of one answer's tokens, each given all before it.

    NaN where the logits are not finite.
    """

    request: Request
    answer: int
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt that was read for its answers: `kv_caches` hold all of its tokens but the last."""

    request: Request
    kv_caches: list[Any]


@dataclass(frozen=True, slots=True)
class ScoringStep:
    """What came of one forward. `read_tokens` counts its padding, too."""

    read_tokens: int
    answers: list[ScoredAnswer]
    prompts: list[ReadPrompt]


@dataclass(slots=True, eq=False)
class _Row:
    """Tokens to be fed, `position` of them done, and the token that should follow each.

    `answer` None: the beginning that a request's answers have in common; nothing is wanted of it but its
    caches. `cache` is the row's own until it joins the batch.
    """

    request: Request
    answer: int | None
    cache: list[Any]
    inputs: tuple[int, ...]
    targets: tuple[int, ...] = ()
    position: int = 0
    logprobs: list[float] = field(default_factory=list)

    @property
    def left_tokens(self) -> int:
        return len(self.inputs) - self.position


class ScoringBatch:
    """Rows that wait and rows that are read together; `max_rows` at most are.

    A row leaves as soon as it ends, and what pads a forward comes after the last token of a row that ends in
    it. So padding is seen by nothing, whatever kind of caches a model has.
    """

    def __init__(self, routed: RoutedModel, max_rows: int) -> None:
        self._routed = routed
        self._max_rows = max_rows
        self._waiting: list[_Row] = []
        self._rows: list[_Row] = []
        self._cache: list[Any] = []  # of the rows, in their order

    def __len__(self) -> int:
        """Rows, those that wait included."""
        return len(self._waiting) + len(self._rows)

    @property
    def rows(self) -> int:
        """Rows that are read together now."""
        return len(self._rows)

    def start(self, request: Request, kv_caches: list[Any] | None, cached: int) -> None:
        """Take a request; `kv_caches` hold the first `cached` tokens of its prompt (None: none)."""
        routed, row = self._routed, request.submit.row
        cache = routed.new_cache(row) if kv_caches is None else routed.with_row(kv_caches, row)
        beginning = request.submit.prompt_tokens[cached:-1]
        if beginning:
            self._waiting.append(_Row(request, None, cache, beginning))
        else:
            self._waiting.extend(self._answer_rows(request, routed.strip(cache)))

    def _answer_rows(self, request: Request, kv_caches: list[Any]) -> Iterator[_Row]:
        """A row for each answer that is still wanted. They share the caches: merging copies, changes none."""
        scoring = request.scoring
        for answer in sorted(request.open):
            tokens = scoring.answers[answer]
            inputs = (scoring.prompt_tokens[-1], *tokens[:-1])
            yield _Row(request, answer, self._routed.with_row(kv_caches, scoring.row), inputs, tokens)

    def remove(self, request: Request) -> None:
        """Forget the rows of `request` for what is not open any more."""
        self._waiting = [row for row in self._waiting if not _is_over(row, request)]
        self._keep([at for at, row in enumerate(self._rows) if not _is_over(row, request)])

    def clear(self) -> None:
        """Forget everything."""
        self._waiting, self._rows, self._cache = [], [], []

    def step(self, budget_tokens: int) -> ScoringStep:
        """One forward of about `budget_tokens` tokens, padding included."""
        self._join(budget_tokens)
        rows = self._rows
        length = first_read([row.left_tokens for row in rows], budget_tokens, budget_tokens)
        # Caches that are wanted must not hold padding.
        length = min([length, *(row.left_tokens for row in rows if row.answer is None)])
        self._forward(length)
        for row in rows:
            row.position = min(row.position + length, len(row.inputs))
        ended = [at for at, row in enumerate(rows) if not row.left_tokens]
        step = ScoringStep(len(rows) * length, [], [])
        begun: list[_Row] = []
        for at in ended:
            row = rows[at]
            if row.answer is not None:
                step.answers.append(ScoredAnswer(row.request, row.answer, tuple(row.logprobs)))
                continue
            kv_caches = self._routed.strip([entry.extract(at) for entry in self._cache])
            mx.eval([entry.state for entry in kv_caches])
            step.prompts.append(ReadPrompt(row.request, kv_caches))
            begun.extend(self._answer_rows(row.request, kv_caches))
        self._keep([at for at in range(len(rows)) if at not in set(ended)])
        self._waiting = begun + self._waiting
        return step

    def _join(self, budget_tokens: int) -> None:
        """Let waiting rows into the batch: of each request one, and more where that makes the forward fuller.

        Those of the request with the fewest rows in the batch come first.
        """
        present = Counter(row.request.request_id for row in self._rows)
        left = [row.left_tokens for row in self._rows]
        joining: list[_Row] = []
        while self._waiting and len(left) < self._max_rows:
            row = min(self._waiting, key=lambda one: present[one.request.request_id])
            longest = max([row.left_tokens, *left])
            fits = (len(left) + 1) * min(longest, _MIN_SHARE_TOKENS) <= budget_tokens
            if left and present[row.request.request_id] and not fits:
                break
            self._waiting.remove(row)
            joining.append(row)
            left.append(row.left_tokens)
            present[row.request.request_id] += 1
        if joining:
            self._merge(joining)

    def _merge(self, joining: list[_Row]) -> None:
        by_layer = zip(*(row.cache for row in joining), strict=True)
        merged = [entries[0].merge(entries) for entries in by_layer]
        for row in joining:
            row.cache = []
        if self._rows:
            for entry, more in zip(self._cache, merged, strict=True):
                entry.extend(more)
        else:
            self._cache = merged
        self._rows.extend(joining)

    def _forward(self, length: int) -> None:
        """Feed the next `length` tokens of each row, a shorter one padded, and note what was wanted."""
        rows = self._rows
        inputs, targets = np.zeros((2, len(rows), length), dtype=np.int32)
        for at, row in enumerate(rows):
            _fill(inputs[at], row.inputs, row.position)
            _fill(targets[at], row.targets, row.position)
        logits = self._routed(mx.array(inputs), cache=self._cache)
        # Where only prompts are read, nobody asks for logits, and none are computed.
        is_wanted = any(row.targets for row in rows)
        logprobs = _logprobs_of(logits, mx.array(targets)) if is_wanted else None
        del logits
        mx.eval(logprobs, [entry.state for entry in self._cache])
        mx.clear_cache()
        if logprobs is not None:
            for row, found in zip(rows, np.array(logprobs), strict=True):
                row.logprobs.extend(found[: row.left_tokens].tolist() if row.targets else ())

    def _keep(self, kept: Sequence[int]) -> None:
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[at] for at in kept]
        if not kept:
            self._cache = []
        for entry in self._cache:
            entry.filter(list(kept))


def _is_over(row: _Row, request: Request) -> bool:
    if row.request is not request:
        return False
    return not request.open if row.answer is None else row.answer not in request.open


def _fill(into: np.ndarray, tokens: Sequence[int], start: int) -> None:
    piece = tokens[start : start + len(into)]
    into[: len(piece)] = piece


def _logprobs_of(logits: mx.array, targets: mx.array) -> mx.array:
    """The log-softmax of `logits` (B, L, vocabulary) at `targets` (B, L); (B, L), float32.

    NaN where logits are NaN or +inf, or all are -inf; -inf where the target is ruled out. Nothing scales or
    filters the logits before: temperature, penalties and biases are about choosing.
    """
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    sums = mx.logsumexp(logits, axis=-1)
    return mx.where(mx.isfinite(sums), chosen - sums, mx.nan)
