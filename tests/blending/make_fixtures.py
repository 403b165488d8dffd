"""Makes `peft.safetensors` beside it: what PEFT's `add_weighted_adapter` merges. `python make_fixtures.py`.

Run it by hand, with torch 2.13, peft 0.21.2 and safetensors installed; the tests need no torch and no PEFT.
The file holds the factors of three adapters in mlx-lm's orientation, `NAME.MODULE.lora_a` and `.lora_b`,
and for each case the merged deltas, `CASE.MODULE`, as lora_a lora_b gives them. Its metadata holds the
scales and the cases as JSON.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

MODULES = ("embed", "up", "down")
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["embed", "up", "down"]},
    "b": {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]},
    "c": {"r": 6, "lora_alpha": 3, "target_modules": ["embed", "up"]},
}
TWO = {"a": 1.0, "b": 1.0}
MIXED = {"a": 0.7, "b": -1.3, "c": 2.0}
POSITIVE = {"a": 0.4, "b": 1.5, "c": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "cat": {"parts": MIXED, "peft": "cat", "method": "linear"},
    "svd": {"parts": MIXED, "peft": "svd", "method": "svd"},
    "svd_3": {"parts": POSITIVE, "peft": "svd", "method": "svd", "rank": 3},
    "ties": {"parts": POSITIVE, "peft": "ties_svd", "method": "ties", "density": 0.4},
    "ties_12": {"parts": POSITIVE, "peft": "ties_svd", "method": "ties", "density": 0.7, "rank": 12},
    "dare_linear": {"parts": MIXED, "peft": "dare_linear_svd", "method": "dare_linear", "density": 1.0},
    "dare_ties": {"parts": POSITIVE, "peft": "dare_ties_svd", "method": "dare_ties", "density": 1.0},
    # On the factors, so that it is not the sum: kept to show the difference.
    "on_factors": {"parts": TWO, "peft": "linear", "method": "linear"},
}


class Tiny(torch.nn.Module):
    """One module of each kind that PEFT merges."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(24, 16)
        self.up = torch.nn.Linear(16, 20, bias=False)
        self.down = torch.nn.Linear(20, 16, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.embed(tokens)))


def main() -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    configs = {name: LoraConfig(**fields, init_lora_weights=False) for name, fields in ADAPTERS.items()}
    model = get_peft_model(Tiny(), configs["a"], adapter_name="a")
    for name in ("b", "c"):
        model.add_adapter(name, configs[name])
    tensors: dict[str, torch.Tensor] = {}
    for name, fields in ADAPTERS.items():
        for module in fields["target_modules"]:
            a, b = factors(model, module, name)
            tensors |= {f"{name}.{module}.lora_a": a.T, f"{name}.{module}.lora_b": b.T}
    for case, fields in CASES.items():
        parts = fields["parts"]
        model.base_model.add_weighted_adapter(
            list(parts), list(parts.values()), case, fields["peft"],
            svd_rank=fields.get("rank"), density=fields.get("density"),
        )  # fmt: skip
        for module in MODULES:
            if any(module in ADAPTERS[part]["target_modules"] for part in parts):
                a, b = factors(model, module, case)
                tensors[f"{case}.{module}"] = a.T @ b.T
    scales = {name: fields["lora_alpha"] / fields["r"] for name, fields in ADAPTERS.items()}
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        Path(__file__).with_name("peft.safetensors"),
        {"scales": json.dumps(scales), "cases": json.dumps(CASES)},
    )


def factors(model: Any, module: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) of an adapter, as PEFT holds them."""
    layer = getattr(model.base_model.model, module)
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


if __name__ == "__main__":
    main()
