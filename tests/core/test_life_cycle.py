"""Any sequence of loads, fuses, failures and their undoing leaves the base bit for bit as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.errors import ContainerStateError
from tests.models import (
    adapter_values,
    make_adapter,
    snapshot,
    tiny_llama,
)

KINDS = ["lora", "dora"]


def _config(kind: str = "lora", **values: Any) -> AdapterConfig:
    return AdapterConfig.from_values(adapter_values(kind, **values), "test")


class LifeCycle(RuleBasedStateMachine):
    """Any sequence of loads, fuses, failures and their undoing leaves the base as it was."""

    folder: Path

    @initialize(bits=st.sampled_from([None, 4]))
    def start(self, bits: int | None) -> None:
        self.model = tiny_llama(0, bits, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
        self.base = snapshot(self.model)
        self.undo: list[Callable[[], None]] = []
        self.containers = {
            kind: AdapterContainer.from_directory(
                make_adapter(self.folder / f"{kind}{bits}", self.model, kind, keys=None)
            )
            for kind in KINDS
        }
        self.loaded: AdapterContainer | None = None

    @precondition(lambda self: self.loaded is None)
    @rule(kind=st.sampled_from(KINDS))
    def load(self, kind: str) -> None:
        container = self.containers[kind]
        container.load(into=self.model)
        self.loaded = container

        def unload() -> None:
            container.unload(from_=self.model)
            self.loaded = None

        self.undo.append(unload)

    @precondition(lambda self: self.loaded is None)
    @rule(kind=st.sampled_from(KINDS))
    def train_a_new_one(self, kind: str) -> None:
        container = AdapterContainer.from_model(self.model, _config(kind))
        self.loaded = container

        def unload() -> None:
            container.unload(from_=self.model)
            self.loaded = None

        self.undo.append(unload)

    @precondition(lambda self: len(self.undo) < 4)
    @rule(kind=st.sampled_from(KINDS), precision=st.sampled_from(["auto", "requantize", "dequantize"]))
    def fuse(self, kind: str, precision: Any) -> None:
        loaded = self.loaded
        fusion = (loaded or self.containers[kind]).fuse(with_=self.model, precision=precision)
        self.loaded = None

        def undo() -> None:
            fusion.undo()
            self.loaded = loaded

        self.undo.append(undo)

    @precondition(lambda self: self.loaded is not None)
    @rule(kind=st.sampled_from(KINDS))
    def fail_to_load(self, kind: str) -> None:
        before = snapshot(self.model)
        with pytest.raises(ContainerStateError):
            self.containers[kind].load(into=self.model)
        assert snapshot(self.model) == before

    @precondition(lambda self: self.undo)
    @rule()
    def undo_the_last(self) -> None:
        self.undo.pop()()

    @invariant()
    def nothing_is_left_once_all_is_undone(self) -> None:
        if not self.undo:
            assert snapshot(self.model) == self.base

    def teardown(self) -> None:
        while self.undo:
            self.undo.pop()()
        self.nothing_is_left_once_all_is_undone()


def test_any_life_leaves_the_base_bit_for_bit(tmp_path: Path) -> None:
    class Here(LifeCycle):
        folder = tmp_path

    run_state_machine_as_test(Here, settings=settings(max_examples=30, stateful_step_count=12, deadline=None))
