"""Models with random weights in the shapes of real ones, made on this machine, for what speed depends on.

Nothing is downloaded. The tokenizer is the demo's if its package is installed, else one whose tokens are
single bytes. Main thread.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from adapters_core.files import new_folder
from server.demo.model import DemoModelError, demo_model

__all__ = ["RANDOM_MODELS", "Shape", "random_model", "write_random_model"]

_FILE_BYTES = 4_000_000_000
_SIZE = 0.02  # of the weights, as models are initialised
_VOCABULARY = 49152  # the demo's tokenizer's
_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    dtype: str = "bfloat16"


RANDOM_MODELS: Mapping[str, Shape] = {
    "random-8b": Shape(4096, 32, 14336, 32, 8),
    "random-1b": Shape(2048, 16, 8192, 32, 8),
}


def random_model(name: str, cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """The folder of a model of `RANDOM_MODELS`, made on the first call and then kept in `cache_dir`.

    Raises: OSError if it cannot be written.
    """
    home = cache_dir / "random-models" / name
    folder = home / name
    if folder.is_dir():
        return folder
    try:
        demo = demo_model("4bit", cache_dir, progress)
    except DemoModelError:
        demo = None
    progress(f"Making {name}, once, in {home} …")
    with new_folder(home) as made:
        write_random_model(RANDOM_MODELS[name], made / name, tokenizer_of=demo)
    return folder


def write_random_model(shape: Shape, folder: Path, *, tokenizer_of: Path | None) -> None:
    """A model folder, with the tokenizer of another's or one that is made.

    No answer of it ends before it has all its tokens. Raises: OSError.
    """
    folder.mkdir(parents=True)
    end, vocabulary_tokens = _write_tokenizer(folder, tokenizer_of)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary_tokens,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "eos_token_id": end,
        "torch_dtype": shape.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dtype = getattr(mx, shape.dtype)
    # Of the parameters of the model that is made here only the names and shapes are used: they stay lazy.
    model = llama.Model(llama.ModelArgs.from_dict(config))
    parameters = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    shapes = {path: array.shape for path, array in parameters}
    del model, parameters
    files: dict[str, str] = {}
    part: dict[str, mx.array] = {}
    keys = iter(mx.random.split(mx.random.key(1), len(shapes)))
    for path, wanted in shapes.items():
        drawn = _SIZE * mx.random.normal(wanted, key=next(keys)) if len(wanted) > 1 else mx.ones(wanted)
        if path == "lm_head.weight":
            drawn[end] = 0  # other logits are as often above zero as below, so the end is never the largest
        part[path] = drawn.astype(dtype)
        mx.eval(part[path])
        if sum(array.nbytes for array in part.values()) > _FILE_BYTES or path == list(shapes)[-1]:
            name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
            mx.save_safetensors(str(folder / name), part, metadata={"format": "mlx"})
            files |= dict.fromkeys(part, name)
            part = {}
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    mx.clear_cache()


def _write_tokenizer(folder: Path, source: Path | None) -> tuple[int, int]:
    """Returns the token that ends an answer, and the size of the vocabulary."""
    if source is None:
        return _write_byte_tokenizer(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    return config["eos_token_id"], config["vocab_size"]


def _write_byte_tokenizer(folder: Path) -> tuple[int, int]:
    """Texts are read byte by byte; what else the vocabulary has are words that a model may answer with."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{index}" for index in range(_VOCABULARY - len(letters) - len(_MARKS))]
    vocabulary = {token: index for index, token in enumerate([*_MARKS, *letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in _MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "bos_token": _MARKS[1],
        "eos_token": _MARKS[2],
        "pad_token": _MARKS[2],
        "unk_token": _MARKS[0],
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return vocabulary[_MARKS[2]], _VOCABULARY
