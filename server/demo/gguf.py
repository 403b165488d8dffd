"""Reads a Llama model out of a GGUF file, as mlx-lm's weights and configuration.

It knows GGUF's names and its row order for rotary attention, and mlx-lm's names for the same tensors. It
does not know where the file comes from, nor the tokenizer (see `tokenizer.py`). It keeps no state and runs
on whichever thread calls it; the arrays that it returns are lazy, so they must be evaluated on that same
thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

__all__ = ["GGUFFormatError", "LlamaGGUF", "Variant", "read_gguf"]

Variant = Literal["float32", "4bit"]

_GROUP_SIZE = 32  # GGUF's Q4_1 and Q8_0 blocks are 32 values long
_MAIN_BITS = 4
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFormatError(Exception):
    """The GGUF file is not a Llama model of the kind that this module reads."""


@dataclass(frozen=True, slots=True)
class LlamaGGUF:
    """A Llama model as it lies in a GGUF file.

    `tensors`: MLX's view of the file by GGUF's names; a quantised one is a triple of `.weight` (packed
    uint32), `.scales` and `.biases` (float16), MLX's affine quantisation with groups of 32. `metadata`: the
    file's keys.
    """

    tensors: dict[str, mx.array]
    metadata: dict[str, Any]

    def config(self, variant: Variant) -> dict[str, Any]:
        """mlx-lm's `config.json`, every value taken from the metadata. Raises GGUFFormatError."""
        value = self._value
        heads = value("llama.attention.head_count")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": value("llama.embedding_length"),
            "intermediate_size": value("llama.feed_forward_length"),
            "num_hidden_layers": value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": value("llama.attention.head_count_kv"),
            "head_dim": value("llama.rope.dimension_count"),
            "rms_norm_eps": _shortest_float(value("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest_float(value("llama.rope.freq_base")),
            "max_position_embeddings": value("llama.context_length"),
            "vocab_size": value("llama.vocab_size"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.eos_token_ids(),
            "pad_token_id": value("tokenizer.ggml.padding_token_id"),
            "torch_dtype": "float32" if variant == "float32" else "float16",
        }
        if variant == "4bit":
            config["quantization"] = self._quantization()
        return config

    def eos_token_ids(self) -> list[int]:
        """Ids that end a reply: a turn's end, and a text's end (this family's unknown token)."""
        turn_end = self._value("tokenizer.ggml.eos_token_id")
        text_end = self._value("tokenizer.ggml.unknown_token_id")
        return [turn_end] if turn_end == text_end else [turn_end, text_end]

    def weights(self, variant: Variant) -> dict[str, mx.array]:
        """mlx-lm's weights by mlx-lm's names, lazy.

        `float32`: every matrix dequantised, exactly, to float32 (out, in). `4bit`: the file's own
        quantisation bit for bit, with float16 scales, biases and norms. Raises GGUFFormatError for a tensor
        without a place.
        """
        weights: dict[str, mx.array] = {}
        for stem in sorted({name.rpartition(".")[0] for name in self.tensors}):
            parts = self._parts(stem)
            if "scales" not in parts:
                dtype = mx.float32 if variant == "float32" else mx.float16
                parts = {"weight": parts["weight"].astype(dtype)}
            elif variant == "float32":
                parts = {"weight": self._dequantised(parts)}
            weights.update({f"{_mlx_name(stem)}.{part}": array for part, array in parts.items()})
        return weights

    def _parts(self, stem: str) -> dict[str, mx.array]:
        """The one or three arrays of a tensor, in the row order that mlx-lm's rotary embedding expects."""
        parts = {
            part: self.tensors[f"{stem}.{part}"]
            for part in ("weight", "scales", "biases")
            if f"{stem}.{part}" in self.tensors
        }
        heads_key = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
        key = heads_key.get(stem.rpartition(".")[2])
        if key is None:
            return parts
        heads = self._value(key)
        return {part: _deinterleaved(array, heads) for part, array in parts.items()}

    def _dequantised(self, parts: dict[str, mx.array]) -> mx.array:
        return mx.dequantize(
            parts["weight"],
            parts["scales"].astype(mx.float32),
            parts["biases"].astype(mx.float32),
            group_size=_GROUP_SIZE,
            bits=_bits(parts["weight"], parts["scales"]),
        )

    def _quantization(self) -> dict[str, Any]:
        """The `quantization` entry of mlx-lm's configuration; modules with other bits are listed by name."""
        quantization: dict[str, Any] = {"group_size": _GROUP_SIZE, "bits": _MAIN_BITS, "mode": "affine"}
        for name, scales in self.tensors.items():
            stem, _, part = name.rpartition(".")
            if part != "scales":
                continue
            bits = _bits(self.tensors[f"{stem}.weight"], scales)
            if bits != _MAIN_BITS:
                quantization[_mlx_name(stem)] = {"group_size": _GROUP_SIZE, "bits": bits, "mode": "affine"}
        return quantization

    def _value(self, key: str) -> Any:
        """A metadata value as a Python scalar."""
        if key not in self.metadata:
            raise GGUFFormatError(f"expected the GGUF file to have the key {key}, but it has none.")
        value = self.metadata[key]
        return value.item() if isinstance(value, mx.array) else value


def read_gguf(path: Path) -> LlamaGGUF:
    """Open a GGUF file (the arrays stay lazy). Raises GGUFFormatError if it is not a Llama model."""
    loaded = mx.load(str(path), format="gguf", return_metadata=True)
    if not isinstance(loaded, tuple):
        raise GGUFFormatError(f"expected a GGUF file with metadata, but {path.name} has none.")
    tensors, metadata = loaded
    architecture = metadata.get("general.architecture")
    if not isinstance(tensors, dict) or architecture != "llama":
        raise GGUFFormatError(f"expected a GGUF file of architecture llama, but got {architecture!r}.")
    return LlamaGGUF(tensors, metadata)


def _mlx_name(stem: str) -> str:
    """mlx-lm's name of the module that GGUF calls `stem`, such as `blk.3.attn_q`."""
    match stem.split("."):
        case [top] if top in _TOP_NAMES:
            return _TOP_NAMES[top]
        case ["blk", index, part] if part in _BLOCK_NAMES:
            return f"model.layers.{index}.{_BLOCK_NAMES[part]}"
    raise GGUFFormatError(f"expected the tensors of a Llama model, but the GGUF file also has {stem}.")


def _deinterleaved(array: mx.array, heads: int) -> mx.array:
    """Undo GGUF's row order within each head: pairs of a rotation side by side become two halves."""
    rows, columns = array.shape
    return array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _bits(weight: mx.array, scales: mx.array) -> int:
    """Bits per value of a quantised matrix: uint32 words per row against groups per row."""
    return weight.shape[-1] * 32 // (scales.shape[-1] * _GROUP_SIZE)


def _shortest_float(value: float) -> float:
    """A float32 value as the short decimal that was meant: 9.999999747378752e-06 is 1e-05."""
    return float(f"{value:.7g}")
