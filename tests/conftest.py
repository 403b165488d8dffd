"""What every test shares: a fast BLAS, loaded before anything imports MLX, and the demo's real model."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import hypothesis
import pytest
import structlog
from hypothesis import HealthCheck, settings

from server.blas import load_openblas

# OpenBLAS's threads spin while they wait for each other, which ruins a machine that runs anything beside.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

load_openblas()

# Which forms are the fastest is no affair of most tests, and is measured for seconds.
os.environ.setdefault("GRAFT_CALIBRATION", "false")

# On CUDA, float32 products are rounded to TF32 by default, about 1e-3: too coarse to compare with.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from server.cache_dir import default_cache_dir  # noqa: E402
from server.demo.model import demo_model  # noqa: E402 (MLX may be imported only from here on)

# They need packages of their own; scripts/test-clients runs them.
collect_ignore = ["clients"]

# How long a draw takes depends on the machine, and on what else runs there.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

# No property says how fast a machine is. What else depends on where it runs, as fixed examples in CI, stays.
settings.register_profile(
    "any speed", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any speed")

# By default, structlog shows an exception with all variables, in colour, which takes a second for each.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest tests first, so that no process is alone with them at the end."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Engines collect garbage when they end: spare them looking through all that was imported, each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """SmolLM2-135M-Instruct in float32: a model folder, converted once and kept in the cache between runs."""
    return demo_model("float32", default_cache_dir(), progress=lambda message: None)
