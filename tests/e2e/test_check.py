"""`mlx-graft check` on the demo's real model, as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.running import run


def test_the_demos_model_is_exact(tmp_path: Path, demo_model_path: Path) -> None:
    file = tmp_path / "report.json"
    done = run("check", str(demo_model_path), "--rows", "8", "--no-speed", "--json", str(file))
    assert done.code == 0, done.out + done.err
    assert "comparisons are exact." in done.out
    values = json.loads(file.read_text())
    assert values["exact"] is True
    assert values["layouts"] == 12
    assert all(finding["passed"] for finding in values["findings"])
    assert 0 < values["noise"] < 1e-4
