"""Whether PEFT itself computes what this project does with the PEFT folders that it writes. Run by hand:

    python -m tests.peft.check_written write FOLDER       with this project's Python: adapters, and our logits
    python -m tests.peft.check_written compare FOLDER     with a Python that has peft and torch: theirs

The models are those of `fixtures/`. The second prints the largest difference of the logits for each adapter,
and ends with 1 if one is over 1e-4. Found with PEFT 0.21.2, torch 2.13.0 and transformers 5.24.0: none is.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent / "fixtures"
SELF = "model.layers.{}.self_attn.{}_proj"
DOWN, EMBED, HEAD = "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"
Q0, Q1, V1 = SELF.format(0, "q"), SELF.format(1, "q"), SELF.format(1, "v")
MIXTRAL, QWEN = "model.layers.0.block_sparse_moe.switch_mlp.{}", "model.layers.{}.mlp.switch_mlp.{}"

# Name: model, DoRA, whether one module has a bias, and rank and scale by module.
CASES: dict[str, tuple[str, bool, bool, dict[str, tuple[int, float]]]] = {
    "uniform": ("llama", False, False, {Q0: (4, 2.0), Q1: (4, 2.0), HEAD: (4, 2.0)}),
    "ranks-and-scales": (
        "llama",
        False,
        False,
        {Q0: (4, 2.0), Q1: (7, 1 / 3), V1: (1, -3.7), DOWN: (4, 0.1)},
    ),
    "dora": ("llama", True, False, {Q0: (4, 2.0), Q1: (3, 0.7), DOWN: (2, 1.0)}),
    "bias": ("llama", False, True, {Q0: (4, 2.0), Q1: (4, 2.0)}),
    "embedding": ("llama", False, False, {EMBED: (4, 2.0), V1: (3, 1.5)}),
    "tied-embedding": ("qwen3", False, False, {EMBED: (4, 2.0), V1: (3, 1.5)}),
    "tied-otherwise": ("qwen3", False, False, {EMBED: (3, 1.5), Q0: (2, 2.0), V1: (2, 2.0)}),
    "embedding-dora": ("llama", True, False, {EMBED: (4, 2.0), V1: (3, 1.5)}),
    "lookup-dora": ("qwen3", True, False, {EMBED: (4, 2.0), V1: (3, 1.5)}),
    "experts": (
        "mixtral",
        False,
        False,
        {
            Q0: (4, 2.0),
            MIXTRAL.format("gate_proj"): (2, 1.5),
            MIXTRAL.format("up_proj"): (2, 1.5),
            MIXTRAL.format("down_proj"): (3, 0.7),
        },
    ),
    "some-experts": (
        "qwen3_moe",
        False,
        False,
        {
            QWEN.format(0, "up_proj"): (2, 1.5),
            QWEN.format(1, "gate_proj"): (1, 0.7),
            QWEN.format(1, "up_proj"): (3, 1.5),
        },
    ),
    "routers": (
        "mixtral",
        False,
        False,
        {
            Q0: (4, 2.0),
            "model.layers.0.block_sparse_moe.gate": (2, 1.5),
            "model.layers.1.block_sparse_moe.gate": (3, 0.7),
            MIXTRAL.format("down_proj"): (3, 0.7),
        },
    ),
    "factors": (
        "falcon_h1",
        False,
        False,
        {
            SELF.format(0, "o"): (4, 2.0),
            "model.layers.1.mamba.in_proj": (2, 1.5),
            "model.layers.0.feed_forward.down_proj": (4, 2.0),
            EMBED: (4, 2.0),
            HEAD: (3, 0.7),
        },
    ),
    "factors-dora": (
        "falcon_h1",
        True,
        False,
        {SELF.format(0, "o"): (4, 2.0), "model.layers.1.mamba.in_proj": (2, 1.5), EMBED: (4, 2.0)},
    ),
    "other-names": (
        "gpt_neox",
        False,
        False,
        {"model.h.1.attention.dense": (4, 2.0), "model.embed_out": (2, 1.5), "model.embed_in": (4, 2.0)},
    ),
    "transposed": ("gpt2", False, False, {"model.h.1.attn.c_attn": (4, 2.0), "model.h.0.mlp.c_fc": (2, 1.5)}),
    "one-router": ("qwen3_moe", False, False, {Q0: (4, 2.0), "model.layers.1.mlp.gate": (2, 1.5)}),
}


def write(folder: Path) -> None:
    """Adapters in PEFT's format, each with our logits."""
    from dataclasses import replace

    import mlx.core as mx
    import numpy as np

    from adapters_core.container import AdapterContainer
    from adapters_core.formats.writing import write_adapter
    from adapters_core.layers.module_weights import ModuleWeights
    from adapters_core.layers.modules import dense_weight, factor_shapes
    from adapters_core.layers.targets import module_at
    from tests.peft.fixtures import model, tokens

    rng = np.random.default_rng(3)

    def draw(shape: tuple[int, ...]) -> mx.array:
        return mx.array(rng.normal(0, 0.2, shape), dtype=mx.float32)

    for name, (base_name, is_dora, has_bias, modules) in CASES.items():
        base = model(base_name)
        weights = {}
        for path, (rank, scale) in modules.items():
            module = module_at(base, path)
            shapes = factor_shapes(module, rank, is_dora)
            by_feature = is_dora and path == EMBED
            axis = 0 if by_feature else 1
            norms = mx.linalg.norm(dense_weight(module), axis=axis) * 1.2 if is_dora else None
            a, b = draw(shapes["lora_a"]), draw(shapes["lora_b"])
            is_apart = by_feature and base_name == "qwen3"
            weights[path] = ModuleWeights(a, b, norms, scale, lookup_only=is_apart, by_feature=by_feature)
        if has_bias:
            weights[Q0] = replace(weights[Q0], bias=draw(weights[Q0].lora_b.shape[1:]))
        write_adapter(folder / name, weights, "peft", base, base_name=f"tiny/{base_name}")
        before = base(tokens())
        container = AdapterContainer.from_directory(folder / name)
        container.load(into=base)
        logits = base(tokens())
        assert not mx.allclose(logits, before, atol=1e-2).item()
        mx.save_safetensors(str(folder / f"{name}.safetensors"), {"logits": logits})


def compare(folder: Path) -> bool:
    """Whether PEFT's logits are ours."""
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file

    say(f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    tokens = torch.tensor(json.loads((ROOT / "tokens.json").read_text()))
    is_good = True
    for name, (base_name, *_) in CASES.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            base: Any = transformers.AutoModelForCausalLM.from_pretrained(
                ROOT / "models" / base_name, dtype=torch.float32
            )
            model = peft.PeftModel.from_pretrained(base, folder / name).eval()
        with torch.no_grad():
            logits = model(tokens).logits
        difference = (logits - load_file(folder / f"{name}.safetensors")["logits"]).abs().max().item()
        say(f"{name}: {difference:.1e}", *(str(one.message)[:160] for one in caught))
        is_good &= difference <= 1e-4
    return is_good


def say(*lines: str) -> None:
    """Print `lines`, all but the first indented."""
    sys.stdout.write("\n  ".join(lines) + "\n")


if __name__ == "__main__":
    action, where = sys.argv[1:]
    if action == "write":
        Path(where).mkdir(parents=True)
        write(Path(where))
    else:
        sys.exit(0 if compare(Path(where)) else 1)
