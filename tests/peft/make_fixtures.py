"""Makes the fixtures of these tests, with PEFT and torch: tiny models, adapters for them, and PEFT's logits.

    python tests/peft/make_fixtures.py [FOLDER]

needs torch, transformers and peft, which nothing else here does. What it wrote is in `fixtures/`: models as
transformers saves them, one folder for each adapter as PEFT saves it (with `expected.safetensors`, PEFT's own
logits in float32 for `tokens.json`), and the versions in `versions.json`. All numbers are random from fixed
seeds; factors are of a size that makes every mistake visible.
"""
# pyright: reportMissingImports=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 64
TOKENS = [[5, 17, 42, 3, 60, 21], [9, 9, 1, 33, 12, 50], [63, 2, 28, 44, 7, 19]]
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
# Queries, keys, values and outputs are square: a factor in the wrong orientation fits.
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON, **WIDE, intermediate_size=48, tie_word_embeddings=False, attention_bias=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**COMMON, **WIDE, intermediate_size=48, head_dim=8, tie_word_embeddings=True)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        # twice 16 is 32: the two factors of the fused gate and up projections have equal sizes
        MixtralConfig(**COMMON, **WIDE, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON,
            **WIDE,
            head_dim=8,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            tie_word_embeddings=False,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_head=4, n_layer=2, n_positions=32, n_ctx=32)
    ),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            **COMMON,
            **WIDE,
            head_dim=8,
            intermediate_size=48,
            mamba_d_ssm=32,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_heads=4,
            # mlx-lm computes with these two at 1 alone, as published models have the second
            key_multiplier=1.0,
            attention_in_multiplier=1.0,
            attention_out_multiplier=0.5,
            embedding_multiplier=5.656854249492381,
            lm_head_multiplier=0.3,
            mlp_multipliers=[0.8838834764831844, 0.5859375],
            ssm_in_multiplier=1.25,
            ssm_multipliers=[0.35, 0.25, 0.7, 0.5, 0.3],
            ssm_out_multiplier=0.6,
            tie_word_embeddings=False,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=2,
            intermediate_size=128,
            max_position_embeddings=64,
            # what mlx-lm computes
            hidden_act="gelu_new",
        )
    ),
}

QV = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ALL}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": QV}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ALL,
            "rank_pattern": {
                "layers.0.self_attn.q_proj": 2,
                r"layers\.\d+\.mlp\.(up|gate)_proj": 3,
                "up_proj": 9,
            },
            "alpha_pattern": {"q_proj": 5, "^model.layers.1.self_attn.v_proj": 3},
        },
    ),
    "rslora-patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": QV,
            "rank_pattern": {"v_proj": 9},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
        },
    ),
    "regex": (
        "llama",
        {"r": 2, "lora_alpha": 4, "target_modules": r".*\.1\.(self_attn\.[qo]|mlp\.down)_proj"},
    ),
    "all-linear": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}),
    "head": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head", "k_proj"]}),
    "excluded": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ALL,
            "exclude_modules": ["layers.0.self_attn.q_proj", "up_proj"],
        },
    ),
    "excluded-regex": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": "all-linear",
            "exclude_modules": r".*\.0\..*|.*down_proj",
        },
    ),
    "layers": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": ALL, "layers_to_transform": [1]}),
    "layers-pattern": (
        "llama",
        {"r": 2, "lora_alpha": 4, "target_modules": QV, "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "dora": ("llama", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ALL}),
    "dora-rslora": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 3,
            "use_dora": True,
            "use_rslora": True,
            "target_modules": QV,
            "rank_pattern": {"v_proj": 2},
        },
    ),
    "bias": (
        "llama",
        {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "mica": ("llama", {"r": 2, "lora_alpha": 4, "init_lora_weights": "mica", "target_modules": QV}),
    "embedding": (
        "llama",
        {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    ),
    "tied": (
        "qwen3",
        {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
    ),
    "lookup-only": ("qwen3", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "v_proj"]}),
    "tokens": (
        "llama",
        {"r": 2, "lora_alpha": 4, "target_modules": QV, "trainable_token_indices": [5, 9, 63]},
    ),
    "tokens-tied": (
        "qwen3",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": QV,
            "trainable_token_indices": {"embed_tokens": [9, 5, 33]},
        },
    ),
    "embedding-dora": (
        "llama",
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["embed_tokens"]},
    ),
    "qwen3": ("qwen3", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "experts-mixtral": (
        "mixtral",
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "experts-qwen3": (
        "qwen3_moe",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": [],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {".*experts.gate_up_proj": 5},
        },
    ),
    "experts-down": (
        "qwen3_moe",
        {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "gpt2": (
        "gpt2",
        {"r": 4, "lora_alpha": 6, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    ),
    "gpt2-dora": (
        "gpt2",
        {
            "r": 4,
            "lora_alpha": 6,
            "fan_in_fan_out": True,
            "use_dora": True,
            "target_modules": ["c_attn", "c_fc"],
        },
    ),
    "tokens-head": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [60, 3, 9]},
        },
    ),
    "tokens-tied-head": (
        "qwen3",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [9, 5, 33], "lm_head": [9, 5, 33]},
            "ensure_weight_tying": True,
        },
    ),
    "lookup-dora": (
        "qwen3",
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
    ),
    "saved": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens", "lm_head", "norm"],
        },
    ),
    "saved-rows": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
    ),
    "saved-lookup": (
        "qwen3",
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved-tied": (
        "qwen3",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens", "lm_head"],
            "ensure_weight_tying": True,
        },
    ),
    "tokens-dora": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 4,
            "use_dora": True,
            "target_modules": QV,
            "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [60, 3, 9]},
        },
    ),
    "tokens-dora-tied": (
        "qwen3",
        {
            "r": 2,
            "lora_alpha": 4,
            "use_dora": True,
            "target_modules": QV,
            "trainable_token_indices": [5, 9, 33],
        },
    ),
    "saved-dora": (
        "qwen3",
        {
            "r": 2,
            "lora_alpha": 4,
            "use_dora": True,
            "target_modules": QV,
            "modules_to_save": ["embed_tokens", "norm"],
        },
    ),
    "bias-all": (
        "llama",
        {"r": 2, "lora_alpha": 3, "bias": "all", "target_modules": ["q_proj", "down_proj"]},
    ),
    "bias-of-both": (
        "llama",
        {"r": 2, "lora_alpha": 3, "bias": "all", "lora_bias": True, "target_modules": ["q_proj"]},
    ),
    "tied-by-another-name": (
        "gpt2",
        {
            "r": 2,
            "lora_alpha": 4,
            "fan_in_fan_out": True,
            "target_modules": ["c_attn", "wte"],
            "ensure_weight_tying": True,
        },
    ),
    "tied-in-an-expression": (
        "qwen3",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": r".*(embed_tokens|q_proj)",
            "ensure_weight_tying": True,
        },
    ),
    "tied-past-an-expression": (
        "qwen3",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": r"model\.embed_tokens|.*q_proj",
            "ensure_weight_tying": True,
        },
    ),
    "positions": (
        "gpt2",
        {"r": 2, "lora_alpha": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "wpe"]},
    ),
    "routers-qwen3": ("qwen3_moe", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}),
    "routers-mixtral": (
        "mixtral",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "gate"],
            "rank_pattern": {"gate.weight": 3},
            "alpha_pattern": {"layers.1.mlp.gate.weight": 5},
        },
    ),
    "parameter": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "target_parameters": ["k_proj.weight", "layers.1.mlp.up_proj.weight"],
        },
    ),
    "falcon-h1": (
        "falcon_h1",
        {"r": 4, "lora_alpha": 6, "target_modules": [*ALL, "in_proj", "lm_head", "embed_tokens"]},
    ),
    "falcon-h1-dora": (
        "falcon_h1",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_dora": True,
            "target_modules": ["o_proj", "gate_proj", "down_proj", "in_proj", "embed_tokens"],
        },
    ),
    "falcon-h1-tokens": (
        "falcon_h1",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["down_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [60, 3, 9]},
        },
    ),
    "falcon-h1-saved": (
        "falcon_h1",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["in_proj"],
            "modules_to_save": ["embed_tokens", "lm_head", "o_proj"],
        },
    ),
    "gpt-neox": (
        "gpt_neox",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": [
                "query_key_value",
                "dense",
                "dense_h_to_4h",
                "dense_4h_to_h",
                "embed_in",
                "lm_head",
            ],
        },
    ),
}

# Rows that were trained of modules that are saved whole, by the name of the module.
TRAINED_ROWS = {
    "saved-rows": {"embed_tokens": [5, 9], "lm_head": [3, 60, 12]},
    "saved-lookup": {"embed_tokens": [5, 9, 33]},
    "saved-tied": {"embed_tokens": [5, 9, 33]},
    "saved-dora": {"embed_tokens": [5, 9, 33]},
    "falcon-h1-saved": {"embed_tokens": [5, 9, 33], "lm_head": [3, 60]},
}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "fixtures"
    shutil.rmtree(folder, ignore_errors=True)
    for seed, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = make().float().eval()
        _randomize(model.named_parameters(), seed, 0.15)
        _save_model(model, folder / "models" / name)
    tokens = torch.tensor(TOKENS)
    for seed, (name, (base, fields)) in enumerate(ADAPTERS.items()):
        _make_adapter(folder, name, base, fields, seed, tokens)
    _make_old_experts(folder, tokens)
    for path in folder.rglob("README.md"):
        path.unlink()
    (folder / "tokens.json").write_text(json.dumps(TOKENS) + "\n")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def _make_adapter(
    folder: Path, name: str, base: str, fields: dict[str, Any], seed: int, tokens: torch.Tensor
) -> None:
    model = get_peft_model(_load(folder, base), LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    trained = ("lora_", "trainable_tokens_delta")
    factors = [item for item in model.named_parameters() if any(part in item[0] for part in trained)]
    _randomize([(name, value) for name, value in factors if "magnitude" not in name], 100 + seed, 0.2)
    generator = torch.Generator().manual_seed(200 + seed)
    with torch.no_grad():
        for parameter, value in factors:
            if "magnitude" in parameter:
                value *= 0.7 + 0.7 * torch.rand(value.shape, generator=generator)
        for parameter, value in model.named_parameters():
            for module, rows in TRAINED_ROWS.get(name, {}).items():
                if f"{module}.modules_to_save" in parameter:
                    value[rows] = 0.2 * torch.randn(len(rows), value.shape[1], generator=generator)
            if fields.get("bias") == "all" and parameter.endswith("bias") and "lora_" not in parameter:
                value += 0.2 * torch.randn(value.shape, generator=generator)
    directory = folder / "adapters" / name
    model.save_pretrained(directory)
    _tidy(directory, base)
    again = PeftModel.from_pretrained(_load(folder, base), directory).eval()
    with torch.no_grad():
        logits = again(input_ids=tokens).logits
        assert torch.allclose(logits, model(input_ids=tokens).logits, atol=1e-5), name
        plain = _load(folder, base)(input_ids=tokens).logits
    assert (logits - plain).norm() > 0.05 * plain.norm(), name
    save_file({"logits": logits.contiguous()}, directory / "expected.safetensors")


def _make_old_experts(folder: Path, tokens: torch.Tensor) -> None:
    """Experts as modules of their own, as adapters of transformers 4 have them; PEFT converts them."""
    for name, base, block, projections in (
        ("modules-mixtral", "mixtral", "block_sparse_moe", {"w1": (16, 32), "w2": (32, 16), "w3": (16, 32)}),
        (
            "modules-qwen3",
            "qwen3_moe",
            "mlp",
            {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)},
        ),
    ):
        generator = torch.Generator().manual_seed(7)
        tensors = {}
        for layer in range(2):
            for expert in range(4):
                for projection, (rows, columns) in projections.items():
                    path = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{projection}"
                    for leaf, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2))):
                        tensors[f"{path}.{leaf}.weight"] = 0.3 * torch.randn(shape, generator=generator)
        directory = folder / "adapters" / name
        config = LoraConfig(r=2, lora_alpha=5, target_modules=list(projections), task_type="CAUSAL_LM")
        config.save_pretrained(directory)
        save_file(tensors, directory / "adapter_model.safetensors")
        _tidy(directory, base)
        model = PeftModel.from_pretrained(_load(folder, base), directory).eval()
        with torch.no_grad():
            logits = model(input_ids=tokens).logits
            plain = _load(folder, base)(input_ids=tokens).logits
        assert (logits - plain).norm() > 0.05 * plain.norm(), name
        save_file({"logits": logits.contiguous()}, directory / "expected.safetensors")


def _tidy(directory: Path, base: str) -> None:
    """Name the base as a hub would, not by where it lay."""
    path = directory / "adapter_config.json"
    values = json.loads(path.read_text())
    for field, value in values.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            values[field] = sorted(value)
    path.write_text(json.dumps(values | {"base_model_name_or_path": f"tiny/{base}"}, indent=2) + "\n")


def _save_model(model: torch.nn.Module, directory: Path) -> None:
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    # GPT-2's own checkpoints, which mlx-lm reads, lack the prefix that transformers gives them.
    file = directory / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    # Names that transformers 5 has changed and mlx-lm reads.
    path = directory / "config.json"
    values = json.loads(path.read_text())
    if "rope_parameters" in values:
        values["rope_theta"] = values["rope_parameters"]["rope_theta"]
    if values["model_type"] == "gpt_neox":
        values["rotary_emb_base"] = values["rope_parameters"]["rope_theta"]
        values["rotary_pct"] = values["rope_parameters"]["partial_rotary_factor"]
    if hasattr(model.config, "num_experts"):
        values["num_experts"] = model.config.num_experts
    path.write_text(json.dumps(values, indent=2) + "\n")


def _load(folder: Path, base: str) -> torch.nn.Module:
    kind = type(MODELS[base]())
    return kind.from_pretrained(folder / "models" / base, dtype=torch.float32).eval()


def _randomize(parameters: Any, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            if "norm" not in name and "ln_" not in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


if __name__ == "__main__":
    main()
