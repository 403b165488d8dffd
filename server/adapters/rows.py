"""What a request or a fusion computes with, from adapters that have names. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from adapters_core.errors import BlendError
from adapters_core.mixed.residents import RowAdapters, make_row

from .errors import some_of
from .versions import Version

__all__ = ["row_of"]


def row_of(terms: Sequence[tuple[str, Version, float]]) -> RowAdapters:
    """The row of (id, version, weight) terms.

    Raises:
        BlendError: as `make_row`; a DoRA that is weighted, or not alone, is named.
    """
    doras = {adapter_id for adapter_id, version, _ in terms if version.resident.type == "dora"}
    is_alone = len({version for _, version, _ in terms}) == 1
    if doras and not (is_alone and sum(weight for *_, weight in terms) == 1.0):
        raise BlendError(
            f"A DoRA adapter ({some_of(sorted(doras))}) rescales the base, so that its effect is no sum: it "
            "can only be used alone and at weight 1."
        )
    return make_row((version.resident, weight) for _, version, weight in terms)
