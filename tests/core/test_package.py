"""The package's face: its names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import adapters_core


def test_every_public_name_is_there() -> None:
    assert len(set(adapters_core.__all__)) == len(adapters_core.__all__)
    assert adapters_core.__all__ == sorted(adapters_core.__all__, key=lambda name: (name.islower(), name))
    for name in adapters_core.__all__:
        assert getattr(adapters_core, name).__module__.startswith("adapters_core.") or name in {
            "Precision",
            "RowAdapters",
        }
    assert set(adapters_core.__all__) <= set(dir(adapters_core))
    assert not hasattr(adapters_core, "no_such_name")


def test_importing_the_package_its_errors_and_its_config_imports_no_mlx() -> None:
    program = (
        "import sys, adapters_core, adapters_core.errors\n"
        "from adapters_core import AdapterConfig, InvalidAdapterError\n"
        "print('mlx' in sys.modules, 'server' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "False"]
