"""Rebuilds a byte-level BPE tokenizer, with its chat template, from the metadata of a GGUF file.

It knows the SmolLM family: byte-level BPE where each digit is a token of its own. It does not know the
model's weights. It keeps no state and runs on whichever thread calls it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from server.demo.gguf import GGUFFormatError, LlamaGGUF

__all__ = ["write_tokenizer"]

_CONTROL_TYPE = 3  # GGUF's token type for special tokens


def write_tokenizer(gguf: LlamaGGUF, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`. Raises GGUFFormatError for another kind."""
    metadata = gguf.metadata
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise GGUFFormatError(f"expected a tokenizer of kind ('gpt2', 'smollm'), but got {kind!r}.")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"].tolist()
    _tokenizer(tokens, types, metadata["tokenizer.ggml.merges"]).save(str(folder / "tokenizer.json"))
    config = _tokenizer_config(metadata, tokens)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _tokenizer(tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TYPE]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """transformers' settings; its plain fast class takes `tokenizer.json` as it is."""

    def token(role: str) -> str:
        return tokens[metadata[f"tokenizer.ggml.{role}_token_id"].item()]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"].item(),
        "add_prefix_space": metadata["tokenizer.ggml.add_space_prefix"].item(),
        "clean_up_tokenization_spaces": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "chat_template": metadata["tokenizer.chat_template"],
    }
