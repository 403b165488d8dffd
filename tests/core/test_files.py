"""A new folder is whole or not there, whatever happens meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapters_core.errors import FolderChangedError
from adapters_core.files import new_folder, sweep


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


KILLED = """
import sys, time
from pathlib import Path
from adapters_core.files import new_folder, replacing
target = Path(sys.argv[1])
if sys.argv[2] == "folder":
    with new_folder(target) as made:
        (made / "half").write_text("content")
        print("writing", flush=True)
        time.sleep(600)
with replacing(target) as made:
    made.write_text("content")
    print("writing", flush=True)
    time.sleep(600)
"""


@contextmanager
def writing(target: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing `target`, killed at the end of the block at the latest."""
    command = [sys.executable, "-c", KILLED, str(target), kind]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(
    tmp_path: Path, kind: str
) -> None:
    with writing(tmp_path / "x.txt", kind) as process:
        (part,) = os.listdir(tmp_path)
        assert sweep(tmp_path) == []
        with new_folder(tmp_path / "other"):
            assert part in os.listdir(tmp_path)
        process.kill()
        process.wait()
        assert part in os.listdir(tmp_path)
        assert sweep(tmp_path) == [part]
    assert os.listdir(tmp_path) == ["other"]


def test_a_new_folder_sweeps_beside_it(tmp_path: Path) -> None:
    with writing(tmp_path / "x", "folder") as process:
        process.kill()
        process.wait()
    with new_folder(tmp_path / "y"):
        pass
    assert os.listdir(tmp_path) == ["y"]


def test_only_what_bears_the_mark_is_swept(tmp_path: Path) -> None:
    own = [
        ".git",
        f".x.{'0' * 32}",
        ".x.mlx-graft-part",
        f"x.{'0' * 32}.mlx-graft-part",
        f".x.{'0' * 32}.part",
    ]
    for name in own:
        (tmp_path / name).mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("")
    link = tmp_path / f".link.{'0' * 32}.mlx-graft-part"
    link.symlink_to(outside)
    assert sweep(tmp_path) == []
    assert set(os.listdir(tmp_path)) == {*own, "outside", link.name}
    assert os.listdir(outside) == ["file"]


def test_a_folder_is_written_where_it_was_made_whatever_takes_its_parents_place(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    with new_folder(root / "x", follow=False) as temporary:
        root.rename(tmp_path / "moved")
        root.symlink_to(outside)
        (temporary / "file").write_text("content")
    assert list(outside.iterdir()) == []
    assert (tmp_path / "moved" / "x" / "file").read_text() == "content"
    with pytest.raises(FolderChangedError), new_folder(root / "y", follow=False):
        raise AssertionError("expected the block not to begin")
    assert list(outside.iterdir()) == []
