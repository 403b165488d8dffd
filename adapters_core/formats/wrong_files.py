"""What lies in a folder where an adapter's files should: what it is, and what to do, in a sentence.

Goes by names and opens nothing. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ..config import CONFIG_FILE
from .weights import PEFT_WEIGHTS_FILE, WEIGHTS_FILE

__all__ = ["told_by_names"]

# Names get into commands that people copy.
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,200}", re.ASCII)
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
_MODEL = re.compile(r"(model|pytorch_model|consolidated)[\w.-]*\.(safetensors|bin)|weights\.npz")
_STEP_FILE = re.compile(r"\d+_adapters\.safetensors")
_STEP_FOLDER = re.compile(r"checkpoint-\d+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_IMAGE_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

_TO_SAFETENSORS = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "save_file({{k: v.contiguous() for k, v in torch.load('{0}', map_location='cpu', "
    "weights_only=True).items()}}, '{1}')\""
)
_JOIN = (
    'python -c "import glob, mlx.core as mx; t = {}; [t.update(mx.load(f)) for f in '
    "sorted(glob.glob('adapter_model-*.safetensors'))]; mx.save_safetensors('adapter_model.safetensors', t)\""
)
_FROM_NPZ = "python -c \"import mlx.core as mx; mx.save_safetensors('adapters.safetensors', mx.load('{}'))\""
_LEAST_CONFIG = '{"num_layers": -1, "lora_parameters": {"rank": R, "scale": S, "dropout": 0}}'


def told_by_names(names: Collection[str], *, is_peft: bool | None) -> list[str]:
    """What a folder with the files `names` is, which lacks the config (`is_peft` None) or its tensors.

    `is_peft` says whose config is there.
    """
    names = {name for name in names if _PLAIN.fullmatch(name)}
    wanted = PEFT_WEIGHTS_FILE if is_peft else WEIGHTS_FILE
    if CONFIG_FILE not in names and (is_model := _of_a_model(names)):
        return [is_model]
    found = _other_format(names, is_peft) if is_peft is not None else _without_config(names)
    found = found or _in_another_form(names, wanted) or _checkpoints(names, is_peft)
    if not found and is_peft is not None:
        others = sorted(name for name in names if name.endswith(".safetensors"))
        if others:
            found = (
                f"the folder has {_listed(others)}; the file that is read is called {wanted}. If these are "
                f"the adapter's tensors, rename them: `mv {others[0]} {wanted}`"
            )
    return [found or _of_a_model(names)] if found or _of_a_model(names) else []


def _of_a_model(names: Collection[str]) -> str:
    if "config.json" not in names or not any(_MODEL.fullmatch(name) for name in names):
        return ""
    return (
        "this is the folder of a whole model (config.json and its weights), not of an adapter. Serve it with "
        "`mlx-graft serve FOLDER`; a model in torch's format is converted first, with `mlx_lm.convert`"
    )


def _other_format(names: Collection[str], is_peft: bool) -> str:
    if is_peft and WEIGHTS_FILE in names:
        return (
            f"the folder has {WEIGHTS_FILE}, the file of mlx-lm's format, beside a config of PEFT's (it has "
            f"peft_type). If mlx-lm wrote it, put its {CONFIG_FILE} there (num_layers, lora_parameters); "
            f"if PEFT did, rename it: `mv {WEIGHTS_FILE} {PEFT_WEIGHTS_FILE}`"
        )
    if not is_peft and PEFT_WEIGHTS_FILE in names:
        return (
            f"the folder has {PEFT_WEIGHTS_FILE}, the file of PEFT's format, beside a config of mlx-lm's (it "
            f"has no peft_type). If PEFT wrote it, put the {CONFIG_FILE} there that save_pretrained wrote "
            f"with it; if mlx-lm did, rename it: `mv {PEFT_WEIGHTS_FILE} {WEIGHTS_FILE}`"
        )
    return ""


def _without_config(names: Collection[str]) -> str:
    if WEIGHTS_FILE in names:
        return (
            f"the folder has {WEIGHTS_FILE} and not the {CONFIG_FILE} that mlx-lm's trainer writes with it. "
            f"Copy it from there; if it is lost, write one with the rank R and the scale S of the training: "
            f"{_LEAST_CONFIG}"
        )
    if PEFT_WEIGHTS_FILE in names:
        return (
            f"the folder has {PEFT_WEIGHTS_FILE} and not the {CONFIG_FILE} that PEFT's save_pretrained "
            "writes with it. Copy it from there: without it, neither scale nor modules are known"
        )
    return ""


def _in_another_form(names: Collection[str], wanted: str) -> str:
    if image := sorted(name for name in names if name in _IMAGE_FILES):
        return f"{image[0]} is a LoRA of an image model, as diffusers writes it; language models are served"
    if any(_SHARD.fullmatch(name) for name in names):
        return f"the tensors lie in parts (adapter_model-…-of-…). Join them, in the folder: `{_JOIN}`"
    if pickles := sorted(name for name in names if name.endswith(_PICKLES) and not _MODEL.fullmatch(name)):
        first = "adapter_model.bin" if "adapter_model.bin" in pickles else pickles[0]
        return (
            f"the folder has {first}, which torch wrote: reading it could run whatever is in it. Convert it "
            f"where torch is installed, in the folder: `{_TO_SAFETENSORS.format(first, wanted)}`"
        )
    if archives := sorted(name for name in names if name.endswith(".npz")):
        config = (
            ""
            if CONFIG_FILE in names
            else f" There is no {CONFIG_FILE} either, as mlx-lm wrote none: write one with the rank R "
            f"and the scale S of the training, {_LEAST_CONFIG}; up to 0.5, S was scale * alpha / rank."
        )
        return (
            f"the folder has {archives[0]}, as mlx-lm wrote adapters up to 0.5. Convert it, in the folder: "
            f"`{_FROM_NPZ.format(archives[0])}`.{config}"
        )
    if any(name.endswith(".gguf") for name in names):
        return (
            "the folder has an adapter in llama.cpp's format (GGUF), which is not read; put the folder of "
            "the adapter there that it was made of"
        )
    return ""


def _checkpoints(names: Collection[str], is_peft: bool | None) -> str:
    files = sorted((name for name in names if _STEP_FILE.fullmatch(name)), reverse=True)
    folders = [name for name in names if _STEP_FOLDER.fullmatch(name)]
    if files and not is_peft:
        return (
            f"the folder has no adapter yet, but steps of its training, the last of which is {files[0]}; "
            f"`cp {files[0]} {WEIGHTS_FILE}` makes it the adapter"
        )
    if folders:
        last = max(folders, key=lambda name: int(name.rpartition("-")[2]))
        return (
            "the folder has no adapter yet, but steps of its training, the last of which is the folder "
            f"{last}; load that one, by its path"
        )
    return ""


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
