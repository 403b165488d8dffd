"""Files, folders and links that another process swaps while adapters are loaded."""

from __future__ import annotations

from pathlib import Path

from tests.adapters.support import site
from tests.adapters.swaps import load_amid_swaps, make_places


async def test_nothing_outside_the_root_is_served_or_quoted_amid_swaps(
    tmp_path: Path, model_path: Path
) -> None:
    places = make_places(tmp_path, model_path)
    async with site(model_path, places.root, cache_dir=tmp_path / "cache") as started:
        outcome = await load_amid_swaps(started, places, loads=300)
    assert outcome.leaks == []
    assert outcome.internal == []
    assert outcome.served > 30, outcome.refused
    assert outcome.refused.total() > 30
