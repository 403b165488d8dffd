"""A new folder is whole or not there, whatever happens meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapters_core.files import new_folder


def test_a_folder_gets_its_name_when_all_is_written(tmp_path: Path) -> None:
    target = tmp_path / "made" / "x"
    with new_folder(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("content")
        assert temporary.parent == target.parent
        assert temporary.name.startswith(".x.")
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "content"
    assert os.listdir(target.parent) == ["x"]


def test_nothing_is_left_of_a_block_that_raises(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_folder(tmp_path / "x") as temporary:
            (temporary / "file").write_text("content")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_file", [False, True])
def test_what_comes_to_be_there_meanwhile_stays(tmp_path: Path, is_file: bool) -> None:
    target = tmp_path / "x"

    def write_late() -> None:
        with new_folder(target) as temporary:
            (temporary / "file").write_text("late")
            if is_file:
                target.write_text("early")
            else:
                target.mkdir()
                (target / "file").write_text("early")

    with pytest.raises(FileExistsError):
        write_late()
    assert os.listdir(tmp_path) == ["x"]
    assert (target if is_file else target / "file").read_text() == "early"
    with pytest.raises(FileExistsError), new_folder(target):
        raise AssertionError("expected the block not to begin")


def test_a_parent_that_is_a_file_is_no_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError), new_folder(tmp_path / "file" / "x"):
        raise AssertionError("expected the block not to begin")
