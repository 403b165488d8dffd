"""Remakes the demo's adapters from their data: `python -m server.demo.train [ID …]`.

Each is made by `AdapterContainer.from_model`, trained by mlx-lm's own trainer on the answers alone (the
questions are masked), and written by `AdapterContainer.save`. It does not know how adapters are served.
Everything runs on the main thread; an adapter takes minutes on two CPU cores.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

from server.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402 (MLX may be imported only from here on)
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
import typer  # noqa: E402
from mlx.optimizers import Adam  # noqa: E402
from mlx_lm import generate  # noqa: E402
from mlx_lm import load as load_model  # noqa: E402
from mlx_lm.tokenizer_utils import TokenizerWrapper  # noqa: E402
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset  # noqa: E402
from mlx_lm.tuner.trainer import TrainingArgs, train  # noqa: E402
from rich.console import Console  # noqa: E402

from adapters_core import AdapterContainer  # noqa: E402
from server.cache_dir import default_cache_dir  # noqa: E402
from server.demo.gguf import Variant  # noqa: E402
from server.demo.model import demo_model  # noqa: E402
from server.demo.recipes import Recipe, RecipeError, read_recipes  # noqa: E402

__all__ = ["answers", "train_adapter"]

_ROOT = Path(__file__).parents[2] / "config" / "demo"
_MAX_TOKENS = 256  # of a question with its answer; the longest in the data has about 110


def train_adapter(
    model: nn.Module, tokenizer: TokenizerWrapper, recipe: Recipe, data_dir: Path
) -> AdapterContainer:
    """A new adapter, trained on `data_dir`'s train.jsonl and valid.jsonl; it stays loaded in `model`.

    The same recipe, data and machine make the same adapter: the seed sets the factors' start and the order of
    the batches (it sets MLX's and NumPy's global random state, which mlx-lm's trainer draws from).

    Raises:
        OSError: a file of the data is missing.
        InvalidAdapterError: the recipe does not fit the model.
    """
    datasets = [_dataset(data_dir / name, tokenizer) for name in ("train.jsonl", "valid.jsonl")]
    mx.random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    container = AdapterContainer.from_model(model, recipe.adapter_config())
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArgs(
            batch_size=recipe.batch_size,
            iters=recipe.iterations,
            val_batches=-1,
            steps_per_eval=recipe.iterations,
            steps_per_save=recipe.iterations + 1,
            max_seq_length=_MAX_TOKENS,
            adapter_file=str(Path(scratch, "adapters.safetensors")),
        )
        train(model, Adam(learning_rate=recipe.learning_rate), *datasets, args=arguments)
    model.eval()
    return container


def answers(
    model: nn.Module, tokenizer: TokenizerWrapper, questions: list[str], max_tokens: int = 48
) -> list[str]:
    """The model's greedy answer to each question, asked alone."""
    prompts: list[Any] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    return [generate(model, tokenizer, prompt, max_tokens=max_tokens) for prompt in prompts]


def _dataset(path: Path, tokenizer: Any) -> CacheDataset:
    """Chats, one JSON object a line, as mlx-lm's trainer reads them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return CacheDataset(ChatDataset([json.loads(line) for line in lines], tokenizer, mask_prompt=True))


def main(
    ids: Annotated[list[str] | None, typer.Argument(help="Adapters to make; all if none is named.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the adapters.")] = _ROOT / "adapters",
    variant: Annotated[Variant, typer.Option(help="Weights of the base model.")] = "float32",
    cache_dir: Annotated[Path | None, typer.Option(help="Folder for the converted model.")] = None,
) -> None:
    """Train the demo's adapters from their data and recipes in config/demo."""
    console = Console()
    try:
        recipes = read_recipes(_ROOT / "recipes.toml")
        chosen = ids or list(recipes)
        if unknown := [adapter_id for adapter_id in chosen if adapter_id not in recipes]:
            raise RecipeError(f"expected adapters among {', '.join(recipes)}, but got {', '.join(unknown)}.")
    except RecipeError as error:
        raise typer.BadParameter(str(error)) from error
    path = demo_model(variant, cache_dir or default_cache_dir(), console.print)
    model, tokenizer, *_ = load_model(str(path))
    questions = json.loads((_ROOT / "questions.json").read_text(encoding="utf-8"))
    for adapter_id in chosen:
        console.rule(adapter_id)
        container = train_adapter(model, tokenizer, recipes[adapter_id], _ROOT / "data" / adapter_id)
        container.save(out / adapter_id)
        console.print(f"{out / adapter_id}: {container.size_bytes:,} bytes, {container.digest}")
        for question, answer in zip(questions, answers(model, tokenizer, questions), strict=True):
            console.print(f"{question}\n    {answer}", markup=False, highlight=False, soft_wrap=True)
        container.unload(from_=model)


if __name__ == "__main__":
    typer.run(main)
