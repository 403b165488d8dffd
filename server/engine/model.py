"""Loads the resident model: a folder or a hub id → evaluated weights, tokenizer, and what there is to know.

Never runs code that comes with a model. Knows nothing of adapters, requests or threads; called on the
generation thread, since lazy arrays must be evaluated on the thread that made them.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from adapters_core.errors import UnsupportedModelError
from adapters_core.layers.builders import dense_like
from adapters_core.layers.modules import dense_weight, is_quantized
from adapters_core.layers.surgery import replace_modules
from adapters_core.mixed.forms import Forms

from .errors import ModelLoadError
from .kv_memory import KvSizes
from .positions import keep_positions

__all__ = ["UNLIMITED_TOKENS", "Dtype", "LoadedModel", "ModelInfo", "load_model"]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

UNLIMITED_TOKENS = 2**31 - 1
"""`context_tokens` of a model whose config names no limit, as recurrent models do not."""

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
)
_CODE_KEYS = ("auto_map", "model_file")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What others may know of a model without touching its weights.

    `model_id` is the last part of its path or hub id; `context_tokens` and `vocabulary_tokens` bound prompts
    and token ids. `digest` tells this base from any other that this process could have loaded. `kv_sizes` is
    what a row's KV caches take, `forms` how rows with adapters are computed (None: the device's defaults).
    """

    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    model_id: str
    path: Path
    context_tokens: int
    vocabulary_tokens: int
    digest: str
    kv_sizes: KvSizes = field(default_factory=KvSizes)
    forms: Forms | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to serve, every weight evaluated, and what there is to know of it."""

    model: nn.Module
    info: ModelInfo


def load_model(
    path_or_repo: str,
    *,
    dtype: Dtype = "auto",
    revision: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> LoadedModel:
    """Load a model folder, or fetch a hub id (`owner/name`) at `revision` and load that.

    `dtype` "auto" is float32 on a CPU, where it is the fastest (a quantised model stays quantised, with
    float32 scales), and whatever the files hold on a GPU. Another dtype casts every floating-point weight; a
    quantised model on a CPU is dequantised for "float32". `progress` is told of each stage.

    Raises:
        ModelLoadError: not found, not fetched, not a model, or one that wants to run its own code.
        UnsupportedModelError: its KV caches cannot be batched.
    """
    local = _local_folder(path_or_repo, revision)
    folder = local or _fetch(path_or_repo, revision, progress)
    config = _read_config(folder, path_or_repo)
    _refuse_code(config, path_or_repo)
    progress(f"loading {path_or_repo}")
    model, tokenizer, config = _load(folder, path_or_repo)
    model = _cast(model, dtype)
    model.eval()
    mx.eval(model.parameters())
    _require_batching(model)
    keep_positions(model)
    info = ModelInfo(
        tokenizer=tokenizer,
        config=config,
        model_id=local.absolute().name if local else path_or_repo.rsplit("/", 1)[-1],
        path=folder,
        context_tokens=_context_tokens(config),
        # The graph of one forward tells the shape of the logits; it is never evaluated.
        vocabulary_tokens=model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1],
        digest=_digest(folder, model),
        kv_sizes=KvSizes.of(model),
    )
    return LoadedModel(model, info)


def _local_folder(path_or_repo: str, revision: str | None) -> Path | None:
    """The folder that is meant, or None for a hub id."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelLoadError(
                f"a revision chooses a version of a hub id, but {path_or_repo!r} is a folder; leave it out"
            )
        return path
    if path.exists():
        raise ModelLoadError(f"expected a model folder, but {path_or_repo!r} is a file")
    if path.is_absolute() or path_or_repo.startswith((".", "~")) or path_or_repo.count("/") != 1:
        raise ModelLoadError(
            f"there is no folder {path_or_repo!r}, and a hub id would have the form owner/name"
        )
    return None


def _fetch(repo: str, revision: str | None, progress: Callable[[str], None]) -> Path:
    """Download a model, or find it in the local cache of an earlier download; no Python file is fetched."""
    progress(f"fetching {repo}")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES))
    except GatedRepoError as error:
        reason = "access to it has to be granted on the hub first; then set HF_TOKEN"
        raise ModelLoadError(f"model {repo!r} cannot be fetched: {reason}") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(f"no folder and no public model on the hub is named {repo!r}") from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"model {repo!r} has no revision {revision!r}") from error
    except HFValidationError as error:
        raise ModelLoadError(f"{repo!r} is neither a folder nor a valid hub id") from error
    except Exception as error:  # the HTTP client's own errors are not part of the hub library's interface
        raise ModelLoadError(
            f"model {repo!r} cannot be fetched and is not in the local cache: the hub cannot be reached"
        ) from error


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{name!r} is not a model folder: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"config.json of {name!r} cannot be read as JSON") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"config.json of {name!r} must hold an object, got {type(config).__name__}")
    return config


def _refuse_code(config: Mapping[str, Any], name: str) -> None:
    found = [key for key in _CODE_KEYS if config.get(key)]
    if found:
        raise ModelLoadError(
            f"model {name!r} asks to run code of its own ({', '.join(found)} in config.json), which is never "
            "done; use a conversion without it"
        )


def _load(folder: Path, name: str) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    try:
        model, tokenizer, config = mlx_lm.load(  # pyright: ignore[reportAssignmentType] (three with return_config)
            str(folder),
            tokenizer_config={"trust_remote_code": False},
            lazy=True,
            return_config=True,
            trust_remote_code=False,
        )
        mx.eval(model.parameters())
    except Exception as error:  # mlx-lm, transformers and MLX raise what they like on files they cannot use
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelLoadError(f"model {name!r} cannot be loaded: {reason}") from error
    return model, tokenizer, config


def _cast(model: nn.Module, dtype: Dtype) -> nn.Module:
    """The weights in the dtype asked for, but for those that mlx-lm's `cast_predicate` keeps as they are."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if dtype == "auto" and not on_cpu:
        return model
    if dtype == "float32" and on_cpu:
        quantised = [(path, module) for path, module in model.named_modules() if is_quantized(module)]
        replace_modules(model, {path: dense_like(one, dense_weight(one)) for path, one in quantised})
    target = _DTYPES["float32" if dtype == "auto" else dtype]
    may_cast = getattr(model, "cast_predicate", lambda path: True)

    def cast(path: str, array: mx.array) -> mx.array:
        return array.astype(target) if mx.issubdtype(array.dtype, mx.floating) and may_cast(path) else array

    model.update(tree_map_with_path(cast, model.parameters()))
    return model


def _require_batching(model: nn.Module) -> None:
    """Refuse models with a kind of cache that mlx-lm cannot merge into a batch."""

    def kinds(caches: Any) -> set[str]:
        found = set()
        for cache in caches:
            if not hasattr(cache, "merge"):
                found.add(type(cache).__name__)
            found |= kinds(getattr(cache, "caches", ()))
        return found

    unmergeable = sorted(kinds(make_prompt_cache(model)))
    if unmergeable:
        raise UnsupportedModelError(
            [f"this model cannot serve requests in batches: {', '.join(unmergeable)} cannot be merged"]
        )


def _context_tokens(config: Mapping[str, Any]) -> int:
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        for key in _CONTEXT_KEYS:
            value = part.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return UNLIMITED_TOKENS


def _digest(folder: Path, model: nn.Module) -> str:
    """An identity that costs no reading of the weights: the config, and of each weight file its name, size,
    time of change and header (tensor names, shapes, dtypes), and the dtypes that the weights were cast to.

    It names the base within this process, whose prompt caches do not outlive it; it proves nothing.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        stat = path.stat()
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = file.read(header_bytes)
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode() + header)
    dtypes: set[str] = set()
    tree_map_with_path(lambda _, array: dtypes.add(str(array.dtype)), model.parameters())
    digest.update(" ".join(sorted(dtypes)).encode())
    return f"sha256:{digest.hexdigest()}"
