"""What a check found, as plain data: for people to read and for a bug report. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CheckReport", "Finding", "Memory", "Ratio"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that has to be exact.

    `error` is the largest relative error ‖found - expected‖ / ‖expected‖ of a row's logits and `allowed` its
    bound, None where bits are compared. `tokens` counts the greedy choices that were compared and
    `other_tokens` those that differ by more than a tie. `note` says what differs, or what was compared with.
    """

    what: str
    against: str
    passed: bool
    error: float | None = None
    allowed: float | None = None
    tokens: int = 0
    other_tokens: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Ratio:
    """The speed of rows with adapters over that of as many rows on the base, side by side.

    `work` is "decoding" (`tokens` 1) or "reading" (`tokens` of each row at once); `base_ms` is the base's
    median. `ratio` is the median of `blocks` ratios, between `lowest` and `highest`.
    """

    work: str
    side: str
    rows: int
    tokens: int
    base_ms: float
    ratio: float
    lowest: float
    highest: float
    blocks: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the model, of the adapters in the bank, and the most that MLX held in the check."""

    model_bytes: int
    adapter_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All of it. `noise` is the largest relative error of the base alone between batches and single rows."""

    dtype: str
    noise: float
    findings: tuple[Finding, ...]
    ratios: tuple[Ratio, ...]
    memory: Memory
    forms: dict[str, Any]
    layouts: int
    seconds: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether nothing differs."""
        return all(finding.passed for finding in self.findings)

    def to_values(self) -> dict[str, Any]:
        """In JSON's types."""
        return {"exact": self.is_exact, **asdict(self)}
