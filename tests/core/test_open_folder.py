"""What is read of an open folder is what was opened, and nothing outside of its root."""

from __future__ import annotations

import os
import stat
from io import BytesIO
from pathlib import Path

import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import FolderChangedError, OutsideRootError
from adapters_core.formats.reading import read_files
from adapters_core.open_folder import open_directory, open_folder
from tests.models import make_adapter, tiny_llama


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a folder `a` and a link to it, beside a folder outside."""
    for folder in (tmp_path / "root" / "a", tmp_path / "outside"):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    (tmp_path / "root" / "alias").symlink_to("a")
    (tmp_path / "root" / "absolute").symlink_to(tmp_path / "root" / "a")
    return tmp_path / "root"


def test_a_folder_that_is_exchanged_is_read_as_it_was_opened(root: Path) -> None:
    with open_folder("a", root) as folder:
        (root / "a").rename(root / "old")
        (root / "a").symlink_to(root.parent / "outside")
        assert folder.read("file") == b"a"
        assert folder.names() == ["file"]


def test_links_inside_the_root_are_followed_and_those_out_of_it_are_not(root: Path) -> None:
    (root / "a" / "inner").symlink_to("../a/file")
    (root / "a" / "outer").symlink_to(root.parent / "outside" / "file")
    (root / "out").symlink_to("../outside")
    for name in ("a", "alias", "absolute"):
        with open_folder(name, root) as folder:
            assert folder.read("inner") == b"a"
            with pytest.raises(OutsideRootError):
                folder.file("outer")
    for path in ("out", "..", "../outside", ".", "/", "out/../../outside"):
        with pytest.raises(OutsideRootError), open_folder(path, root):
            raise AssertionError("expected it not to be opened")
    with open_folder(root / "a") as anywhere:
        assert anywhere.read("outer") == b"outside"


@pytest.mark.parametrize("at", ["root", "root/a", "root/a/b"])
def test_a_link_that_takes_a_folders_place_is_not_followed(root: Path, at: str) -> None:
    (root / "a" / "b").mkdir()
    folder = root.parent / at
    folder.rename(root.parent / "moved")
    folder.symlink_to(root.parent / "moved")  # realpath was asked before
    with pytest.raises(FolderChangedError), open_directory(root, root / "a" / "b"):
        raise AssertionError("expected it not to be opened")


def test_a_file_that_becomes_a_link_is_the_file_that_was_opened(root: Path) -> None:
    with open_folder("a", root) as folder:
        assert folder.file("file").read() == b"a"
        (root / "a" / "file").unlink()
        (root / "a" / "file").symlink_to(root.parent / "outside" / "file")
        assert folder.read("file") == b"a"
        assert folder.has_changed
        with pytest.raises(FolderChangedError):
            folder.refuse_changed()


def test_a_file_that_is_written_while_it_is_read_is_refused(root: Path) -> None:
    class Written(BytesIO):
        def write(self, part: object) -> int:
            with (root / "a" / "file").open("a") as file:
                file.write("more")
            return super().write(part)  # pyright: ignore[reportArgumentType]

    with open_folder("a", root) as folder, pytest.raises(FolderChangedError):
        folder.copy("file", Written())


def test_what_is_no_regular_file_is_not_there(root: Path) -> None:
    os.mkfifo(root / "a" / "pipe")
    (root / "a" / "folder").mkdir()
    (root / "a" / "loop").symlink_to("loop")
    (root / "a" / "through").symlink_to("file/x")
    for name in ("pipe", "folder", "loop", "through", "nothing", "../a/file", "..", "", "a\0b"):
        with open_folder("a", root) as folder, pytest.raises((FileNotFoundError, OutsideRootError)):
            folder.file(name)
    with pytest.raises(NotADirectoryError), open_folder("a/file", root):
        raise AssertionError("expected it not to be opened")


def test_nothing_stays_open(root: Path) -> None:
    (root / "a" / "inner").symlink_to("file")
    (root / "a" / "out").symlink_to(root.parent / "outside" / "file")
    before = os.listdir("/dev/fd")
    for _ in range(20):
        with open_folder("alias", root) as folder:
            folder.read("inner")
            for name in ("out", "nothing"):
                with pytest.raises((OutsideRootError, FileNotFoundError)):
                    folder.file(name)
    assert len(os.listdir("/dev/fd")) == len(before)


def test_files_that_were_exchanged_between_two_reads_are_not_put_together(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = make_adapter(tmp_path / "a", model, seed=1)
    other = make_adapter(tmp_path / "b", model, seed=2)
    with open_folder("a", tmp_path) as opened:
        read_files(opened)
        os.replace(other / "adapter_config.json", folder / "adapter_config.json")
        with pytest.raises(FolderChangedError, match="try again"):
            AdapterContainer.from_directory(opened)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_is_only_passed_through_need_not_be_listed(root: Path) -> None:
    root.parent.chmod(stat.S_IXUSR)
    try:
        with open_folder("a", root) as folder:
            assert folder.read("file") == b"a"
    finally:
        root.parent.chmod(stat.S_IRWXU)
