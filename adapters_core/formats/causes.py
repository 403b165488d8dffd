"""What is behind many problems of one file: another tool made its tensors than its config says.

A sentence that stands before the problems themselves. Goes by names; does not import mlx-lm, which takes
seconds. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ..config import CONFIG_FILE

__all__ = ["causes_of_names"]

_PEFT_LEAF = re.compile(r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)(?:\.|$)")
_MLX_LEAF = re.compile(r"\.lora_[ab](?:\.\d+)?$")
_VLM_LEAF = re.compile(r"\.[AB]$")
_WHOLE = re.compile(r"\.(?:weight|bias|scales|biases)$")
# How diffusers and ComfyUI begin names, and how kohya's tools end them.
_IMAGE = re.compile(
    r"^(?:base_model\.model\.)?(?:lora_unet_|lora_te\d?_|lora_transformer_|unet\.|text_encoder(?:_2)?\.|"
    r"diffusion_model\.|(?:model\.)?(?:transformer\.)?(?:single_)?"
    r"(?:transformer_blocks|double_blocks|single_blocks|down_blocks|up_blocks)\.)"
)
_KOHYA = re.compile(r"\.(?:lora_down|lora_up)\.weight$|\.alpha$|\.hada_w[12]_[ab]$|\.lokr_w[12]")


def causes_of_names(names: Collection[str], *, is_peft: bool) -> tuple[str, ...]:
    """What tool made tensors of these `names`, if it is another than the config says."""
    cause = None
    if _most(names, _IMAGE) or _most(names, _KOHYA):
        cause = (
            "the tensors are named as in a LoRA of an image model (diffusers, kohya, ComfyUI); adapters of "
            "language models are served"
        )
    elif is_peft and _most(names, _MLX_LEAF):
        cause = (
            f"the tensors are named as in mlx-lm's format (lora_a, lora_b), and {CONFIG_FILE} is PEFT's (it "
            f"has peft_type): put the {CONFIG_FILE} there that mlx-lm wrote, and name the file "
            "adapters.safetensors"
        )
    elif not is_peft and _most(names, _PEFT_LEAF):
        cause = (
            f"the tensors are named as in PEFT's format (lora_A, lora_B), and {CONFIG_FILE} is mlx-lm's (it "
            f"has no peft_type): put the {CONFIG_FILE} there that PEFT wrote, and name the file "
            "adapter_model.safetensors"
        )
    elif not is_peft and _most(names, _VLM_LEAF):
        cause = (
            "the tensors are named as by an older mlx-vlm (A, B); train it again with an mlx-vlm that writes "
            "lora_a and lora_b, or fuse it with mlx-vlm and serve that"
        )
    elif not any("lora" in name for name in names) and _most(names, _WHOLE):
        cause = (
            "the file has whole weights and no factors: it is a model, or a part of one, and not an adapter. "
            "Serve it as a model, with its config.json"
        )
    return () if cause is None else (cause,)


def _most(names: Collection[str], pattern: re.Pattern[str]) -> bool:
    return sum(pattern.search(name) is not None for name in names) * 2 > len(names)
