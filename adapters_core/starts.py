"""What a file is that is not what was expected, by the bytes that it begins with. Opens nothing. Pure."""

from __future__ import annotations

__all__ = ["START_BYTES", "told_by_start"]

START_BYTES = 64
_STARTS = (
    (
        b"version https://git-lfs",
        "this is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`, or download the "
        "adapter with `hf download`",
    ),
    (b"PK\x03\x04", "this is an archive, as torch.save and numpy write them"),
    (b"\x80", "this is a pickle, as older torch.save writes it"),
    (b"GGUF", "this is a file of llama.cpp (GGUF); the adapter that it was made of is needed"),
    (b"<", "this is a web page or XML: what was downloaded is not the file"),
)


def told_by_start(start: bytes) -> str | None:
    """What a file is that begins with `start`, if that is plain and it is no safetensors or JSON file."""
    return next((text for head, text in _STARTS if start.startswith(head)), None)
