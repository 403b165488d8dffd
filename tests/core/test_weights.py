"""adapters.safetensors: digests, threads, and every way to be damaged."""

from __future__ import annotations

import json
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.weights import (
    MAX_HEADER_BYTES,
    WEIGHTS_FILE,
    digest_of,
    least_file_bytes,
    read_weights,
    save_weights,
)
from adapters_core.open_folder import open_folder


def _tensors() -> dict[str, mx.array]:
    return {
        "a.lora_a": mx.arange(12, dtype=mx.float32).reshape(4, 3),
        "a.lora_b": mx.arange(15, dtype=mx.float16).reshape(3, 5),
        "a.m": mx.arange(5, dtype=mx.bfloat16),
    }


def _good(directory: Path) -> bytes:
    save_weights(directory / WEIGHTS_FILE, _tensors())
    return (directory / WEIGHTS_FILE).read_bytes()


def _with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _problems(directory: Path) -> tuple[str, ...]:
    with pytest.raises(InvalidAdapterError) as caught:
        read_weights(directory)
    assert caught.value.source == directory.name
    assert str(directory) not in str(caught.value)
    return caught.value.problems


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    _good(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.tensors.keys() == _tensors().keys()
    for name, tensor in _tensors().items():
        assert weights.tensors[name].dtype == tensor.dtype
        assert mx.array_equal(weights.tensors[name], tensor)
    assert weights.size_bytes == 12 * 4 + 15 * 2 + 5 * 2
    assert weights.digest == digest_of(_tensors())
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]


def test_tensors_read_on_one_thread_are_used_on_another(tmp_path: Path) -> None:
    _good(tmp_path)
    read = []
    thread = threading.Thread(target=lambda: read.append(read_weights(tmp_path)))
    thread.start()
    thread.join()
    assert mx.sum(read[0].tensors["a.lora_a"]).item() == 66


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "a.m": t["a.m"] + 1},
        lambda t: {**t, "a.m": t["a.m"].astype(mx.float32)},
        lambda t: {**t, "a.m": t["a.m"].reshape(1, 5)},
        lambda t: {name.replace("a.m", "b.m"): tensor for name, tensor in t.items()},
        lambda t: {name: tensor for name, tensor in t.items() if name != "a.m"},
    ],
)
def test_the_digest_covers_names_dtypes_shapes_and_values(
    change: Callable[[dict[str, mx.array]], dict[str, mx.array]],
) -> None:
    assert digest_of(change(_tensors())) != digest_of(_tensors())
    assert digest_of(dict(reversed(_tensors().items()))) == digest_of(_tensors())


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_F64 = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "0 byte"),
        (b"\x01\x02", "2 byte"),
        (b"garbage that is longer than a header", "at most"),
        (bytes(64), "damaged"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{" * 100, f"at most {MAX_HEADER_BYTES}"),
        (struct.pack("<Q", 2**64 - 1), f"at most {MAX_HEADER_BYTES}"),
        (struct.pack("<Q", 100) + b"{}", "damaged"),
        (_with_header(b"{not json"), "damaged"),
        (_with_header(b"[]"), "damaged"),
        (_with_header(b'{"a":' * 5000), "damaged"),
        (_with_header({}), "holds none"),
        (_with_header({"__metadata__": {"format": "mlx"}}), "holds none"),
        (_with_header({"a": {**_F32, "dtype": "F99"}}, bytes(8)), "damaged"),
        (_with_header({"a": {**_F32, "shape": [3]}}, bytes(8)), "damaged"),
        (_with_header({"a": {**_F32, "shape": [-2]}}, bytes(8)), "damaged"),
        (_with_header({"a": {**_F32, "shape": [2**40, 2**40]}}, bytes(8)), "damaged"),
        (_with_header({"a": {**_F32, "data_offsets": [8, 0]}}, bytes(8)), "damaged"),
        (_with_header({"a": {**_F32, "data_offsets": [0, 2**60]}}, bytes(8)), "damaged"),
        (_with_header({"a": _F32, "b": _F32}, bytes(8)), "damaged"),
        (_with_header({"a": _F32}, bytes(7)), "damaged"),
        (_with_header({"a": _F32}, bytes(9)), "damaged"),
        (_with_header({"a": {**_F32, "dtype": "I32"}}, bytes(8)), "tensor a: expected dtype float32"),
        (
            _with_header({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"0"),
            "got F8_E4M3, whose",
        ),
        (_with_header({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"0"), "leave it out"),
        (_with_header({"a": _F64}, struct.pack("<d", 1e300)), "1 of 1 are NaN or infinite in float32"),
        (
            _with_header({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
            "1 of 1 tensors are empty",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"PK\x03\x04" + bytes(60), "as torch.save and numpy write them"),
        (b"\x80\x02}q\x00X" + bytes(60), "a pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(60), "llama.cpp"),
        (b"<!DOCTYPE html><html>" + bytes(60), "a web page"),
        (_with_header({"a": _F32}, struct.pack("<2f", 1.0, float("nan"))), "1 of 2 are NaN or infinite"),
        (_with_header({"a": _F32}, struct.pack("<2f", float("-inf"), float("inf"))), "2 of 2"),
    ],
)
def test_damaged_files_are_refused_with_a_reason(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    problems = _problems(tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith(f"{WEIGHTS_FILE}: ")
    assert expected in problems[0]


def test_every_bad_tensor_is_named(tmp_path: Path) -> None:
    nan = {"x.lora_a": mx.array([mx.nan, 1.0]), "y.lora_a": mx.array([1.0]), "z.m": mx.array([mx.inf])}
    save_weights(tmp_path / WEIGHTS_FILE, nan)
    assert [problem.split(":")[1] for problem in _problems(tmp_path)] == [" tensor x.lora_a", " tensor z.m"]
    save_weights(tmp_path / WEIGHTS_FILE, {"x": mx.array([1]), "y": mx.array([1.0]), "z": mx.array([True])})
    assert [problem.split(":")[1] for problem in _problems(tmp_path)] == [" tensor x", " tensor z"]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_any_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    directory = tmp_path_factory.mktemp("cut")
    whole = _good(directory)
    (directory / WEIGHTS_FILE).write_bytes(whole[: cut % len(whole)])
    assert _problems(directory)


def test_missing_files_and_folders_in_their_place_are_refused(tmp_path: Path) -> None:
    assert "there is none" in _problems(tmp_path)[0]
    (tmp_path / WEIGHTS_FILE).mkdir()
    assert "there is none" in _problems(tmp_path)[0]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    before = _good(tmp_path)
    with pytest.raises(OSError, match="cannot be written"):
        save_weights(tmp_path / WEIGHTS_FILE, {"x": "no tensor"})  # pyright: ignore[reportArgumentType]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    with pytest.raises(OSError, match="cannot be written"):
        save_weights(tmp_path / "no such folder" / WEIGHTS_FILE, _tensors())


def test_a_file_is_held_no_longer_than_it_is_parsed(tmp_path: Path) -> None:
    save_weights(tmp_path / WEIGHTS_FILE, {"a": mx.ones((1 << 22,), mx.bfloat16)})
    file_bytes = (tmp_path / WEIGHTS_FILE).stat().st_size
    read_weights(tmp_path)  # whatever is imported or made once
    tracemalloc.start()
    try:
        weights = read_weights(tmp_path)
        held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (
        peak_bytes < 2.75 * file_bytes
    )  # values and what tells whether they are finite, not the file as well
    assert held_bytes < 0.1 * file_bytes  # arrays alone, which are MLX's
    assert weights.size_bytes == 1 << 23


def test_what_an_adapter_takes_at_least_is_told_without_reading(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        with pytest.raises(FileNotFoundError):
            least_file_bytes(folder, WEIGHTS_FILE)
        _good(tmp_path)
        assert least_file_bytes(folder, WEIGHTS_FILE) <= read_weights(tmp_path).size_bytes
        with (tmp_path / WEIGHTS_FILE).open("r+b") as file:
            file.truncate(MAX_HEADER_BYTES + 2000)
        assert least_file_bytes(folder, WEIGHTS_FILE) == 1000
