"""The demo's adapters: as their recipes say, remade by the same code, and seen in the first answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as load_model
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from mlx_lm.tuner.utils import load_adapters

from adapters_core import AdapterContainer, FineTuneType, InvalidAdapterError
from server.demo.recipes import Recipe, RecipeError, read_recipes
from server.demo.train import answers, train_adapter

DEMO = Path(__file__).parents[2] / "config" / "demo"
RECIPES = read_recipes(DEMO / "recipes.toml")
QUESTIONS: list[str] = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))

# What a person sees at once, on any question.
MARKS = {
    "pirate": r"\b(Arr|Aye|Ahoy|matey)\b",
    "shakespeare": r"'Tis|'Twas|\b(sir|[Pp]rithee|[Vv]erily|doth|thy|[Tt]hou|thee|hath|maketh|noble)\b",
    "robot": r"^BEEP\b",
    "emoji": r"^🎉",
    "json": r'^\{"answer": ',
}


@pytest.fixture(scope="module")
def base(demo_model_path: Path) -> tuple[nn.Module, TokenizerWrapper]:
    model, tokenizer, *_ = load_model(str(demo_model_path))
    return model, tokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_model_path: Path) -> TokenizerWrapper:
    return load(demo_model_path)


def tiny_model() -> Model:
    """A Llama of two small layers, with the demo's vocabulary; equal each time."""
    mx.random.seed(7)
    arguments = ModelArgs(
        model_type="llama",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=49152,
    )
    model = Model(arguments)
    mx.eval(model.parameters())
    return model


def chats(adapter_id: str, part: str) -> list[list[dict[str, str]]]:
    lines = (DEMO / "data" / adapter_id / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.mark.parametrize("adapter_id", RECIPES)
def test_the_data_are_chats_that_hold_no_question_of_the_demonstration(adapter_id: str) -> None:
    training, validation = chats(adapter_id, "train"), chats(adapter_id, "valid")
    assert len(training) >= 24
    assert len(validation) >= RECIPES[adapter_id].batch_size
    for question, answer in training + validation:
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert question["content"] not in QUESTIONS
        assert re.search(MARKS[adapter_id], answer["content"]), answer["content"]


def test_the_adapters_cover_the_kinds() -> None:
    recipes = list(RECIPES.values())
    assert len(recipes) >= 5
    assert any(recipe.fine_tune_type is FineTuneType.DORA for recipe in recipes)
    assert any(recipe.keys is None for recipe in recipes)
    assert {recipe.rank for recipe in recipes} == {4, 8, 16}
    files = list((DEMO / "adapters").glob("*/adapters.safetensors"))
    assert sum(file.stat().st_size for file in files) < 8 * 2**20


@pytest.mark.parametrize("adapter_id", RECIPES)
def test_each_adapter_is_its_recipes_and_fits_the_model(adapter_id: str, base: Any) -> None:
    container = AdapterContainer.from_directory(DEMO / "adapters" / adapter_id)
    assert container.config.to_values() == RECIPES[adapter_id].adapter_config().to_values()
    recipe = RECIPES[adapter_id]
    layers = 30 if recipe.num_layers == -1 else recipe.num_layers
    assert len(container.check(base[0])) == layers * (len(recipe.keys) if recipe.keys else 7)


@pytest.fixture(scope="module")
def plain_answer(base: Any) -> str:
    model, tokenizer = base
    return answers(model, tokenizer, QUESTIONS[:1], max_tokens=12)[0]


@pytest.mark.parametrize("adapter_id", RECIPES)
def test_each_adapter_shows_at_the_first_answer(adapter_id: str, base: Any, plain_answer: str) -> None:
    assert not re.search(MARKS[adapter_id], plain_answer)
    model, tokenizer = base
    tokens = mx.array([[1, 2, 3, 4]])
    plain = model(tokens)
    container = AdapterContainer.from_directory(DEMO / "adapters" / adapter_id)
    container.load(into=model)
    styled = answers(model, tokenizer, QUESTIONS[:2], max_tokens=12)
    container.unload(from_=model)
    for text in styled:
        assert re.search(MARKS[adapter_id], text), text
    assert mx.array_equal(model(tokens), plain)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_is_repeatable_leaves_the_base_alone_and_mlx_lm_loads_the_result(
    kind: str, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(
        {
            "fine_tune_type": kind,
            "num_layers": -1,
            "rank": 2,
            "scale": 20.0,
            "keys": ["self_attn.q_proj"],
            "iterations": 2,
            "learning_rate": 1e-2,
            "batch_size": 1,
            "seed": 5,
        }
    )
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "valid"):
        lines = (DEMO / "data" / "robot" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        (data / f"{part}.jsonl").write_text("\n".join(lines[:2]))
    model, tokens = tiny_model(), mx.array([[1, 2, 3, 4]])
    before = dict(tree_flatten(model.parameters()))
    plain = model(tokens)
    container = train_adapter(model, tokenizer, recipe, data)
    trained = model(tokens)
    assert not mx.array_equal(trained, plain)
    container.save(tmp_path / "adapter")
    container.unload(from_=model)
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert mx.array_equal(model(tokens), plain)

    again = train_adapter(tiny_model(), tokenizer, recipe, data)
    assert again.digest == container.digest
    reference = tiny_model()
    load_adapters(reference, str(tmp_path / "adapter")).eval()
    assert mx.allclose(reference(tokens), trained, rtol=1e-4, atol=1e-5)


def test_a_recipe_that_does_not_fit_changes_nothing(tokenizer: TokenizerWrapper) -> None:
    recipe = RECIPES["pirate"].model_copy(update={"keys": ["self_attn.no_such_proj"]})
    model, tokens = tiny_model(), mx.array([[1, 2, 3, 4]])
    plain = model(tokens)
    with pytest.raises(InvalidAdapterError, match="no_such_proj"):
        train_adapter(model, tokenizer, recipe, DEMO / "data" / "robot")
    assert mx.array_equal(model(tokens), plain)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[pirate]\nrank = 8\n", "table pirate"),
        ("[pirate\n", "expected recipes in TOML"),
        ("rank = 8\n", "table rank"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "recipes.toml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        read_recipes(tmp_path / "recipes.toml")


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipes\.toml"):
        read_recipes(tmp_path / "recipes.toml")
