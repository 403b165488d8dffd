"""Ids and paths: what may be read, and that nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.adapters.errors import AdapterNotFoundError, InvalidAdapterIdError, PathNotAllowedError
from server.adapters.folder import AdapterFolders, check_id, configured_folders, is_valid_id

BASE = "base"


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    (path / "adapters.safetensors").write_bytes(b"")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root beside a secret folder, with links into, out of and around it."""
    root = tmp_path / "root"
    folder(root / "good")
    folder(root / "deep" / "er")
    folder(root / "-dash")
    folder(root / BASE)
    folder(tmp_path / "secret")
    folder(tmp_path / "root2")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "alias").symlink_to(root / "good")
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("")
    (root / "leak").mkdir()
    (root / "leak" / "adapter_config.json").symlink_to(tmp_path / "secret" / "adapter_config.json")
    (root / "weights").mkdir()
    (root / "weights" / "adapter_config.json").write_text("{}")
    (root / "weights" / "adapters.safetensors").symlink_to("/etc/passwd")
    return root


@pytest.mark.parametrize("path", ["good", "./good", "deep/../good", "deep/er", "alias", "good/"])
def test_a_path_under_the_root_is_found(root: Path, path: str) -> None:
    found = AdapterFolders(root).find("x", path)
    assert root in found.path.parents
    assert found.shown in ("good", "deep/er")
    assert AdapterFolders(root).find("x", str(root / path)) == found


@pytest.mark.parametrize(
    "path",
    [
        "..", "../secret", "../root2", "../nowhere", "good/../../secret", ".", "good/..", "/", "/etc", "out",
        "out/.", "leak", "weights", "a\0b", "\0", "//etc/passwd", "../root/../secret",
    ],
)  # fmt: skip
def test_a_path_that_leads_out_is_forbidden(root: Path, path: str) -> None:
    for asked in (path, os.path.join(root, path)):
        if os.path.isabs(path) and asked == path and path != "/":
            continue
        with pytest.raises(PathNotAllowedError) as raised:
            AdapterFolders(root).find("x", asked)
        assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "path", ["nowhere", "file", "loop", "good/nowhere", "x" * 5000, "a\nb", "~", "good\\..\\x"]
)
def test_a_path_to_nothing_is_not_found(root: Path, path: str) -> None:
    with pytest.raises(AdapterNotFoundError) as raised:
        AdapterFolders(root).find("x", path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 200


def test_only_what_may_be_loaded_under_its_own_name_is_available(root: Path) -> None:
    folders = AdapterFolders(root)
    assert folders.available(BASE, loaded=["weights"]) == ["alias", "good", "leak"]
    assert folders.on_demand("good") == folders.find("good")
    for name in ("out", "leak", "weights", "deep", "nowhere", "Good"):
        assert folders.on_demand(name) is None


def test_without_a_root_nothing_can_be_named(tmp_path: Path) -> None:
    folders = AdapterFolders(None)
    assert folders.available(BASE, []) == []
    assert folders.on_demand("good") is None
    with pytest.raises(PathNotAllowedError):
        folders.find("good")
    assert AdapterFolders(tmp_path / "gone").available(BASE, []) == []


def test_the_operators_folders_may_lie_anywhere_but_only_under_their_ids(root: Path, tmp_path: Path) -> None:
    configured = configured_folders({"mine": str(tmp_path / "secret"), "inner": "good"}, root)
    folders = AdapterFolders(root, configured)
    assert folders.find("mine").shown == "secret"
    assert folders.find("inner").shown == "good"
    with pytest.raises(PathNotAllowedError):
        folders.find("mine", str(tmp_path / "secret"))
    with pytest.raises(AdapterNotFoundError):
        folders.find("other", "mine")


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True))
def test_ids_of_the_pattern_are_valid(name: str) -> None:
    assert is_valid_id(name, BASE) == (name not in (BASE, "default", "active"))


@given(
    st.one_of(
        st.text(max_size=200).filter(lambda text: not (text.isascii() and text.replace("-", "a").isalnum())),
        st.text("a./-", max_size=12),
    )
)
def test_a_valid_id_is_a_plain_file_name_or_a_plain_path(name: str) -> None:
    if is_valid_id(name, BASE):
        assert os.path.normpath(name) == name
        assert os.path.basename(name) not in ("", ".", "..")
        assert ".." not in name.split("/")
        assert name[0] not in ".-"
        assert name.isascii()
        assert name.isprintable()
        assert ":" not in name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/", "a/../b", "a//b", "/", "a/fuse",
     "a\\b", "a b", "a\n", "\na", "a:b", "é", "x" * 129, "x" * 300, ".hidden",
     "-a", "default", "active", BASE, "a\0"],
)  # fmt: skip
def test_other_ids_are_refused_in_one_printable_line(name: str) -> None:
    with pytest.raises(InvalidAdapterIdError) as raised:
        check_id(name, BASE)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 250
