"""How each of the demo's adapters is made, as `config/demo/recipes.toml` says.

It knows the file's keys, not the training. It keeps no state and runs on any thread.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters_core.config import AdapterConfig, FineTuneType

__all__ = ["Recipe", "RecipeError", "read_recipes"]


class RecipeError(Exception):
    """The recipes cannot be read, or the one that was asked for is not among them."""


class Recipe(BaseModel):
    """One table of the file. `iterations` counts batches; `keys` None stands for all linear layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fine_tune_type: FineTuneType
    num_layers: int
    rank: int = Field(ge=1)
    scale: float
    keys: list[str] | None = None
    iterations: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    seed: int = Field(ge=0)

    def adapter_config(self) -> AdapterConfig:
        """The `adapter_config.json` of this recipe's adapter, with the training's own numbers."""
        parameters = {"rank": self.rank, "scale": self.scale, "dropout": 0.0}
        return AdapterConfig.from_values(
            {
                "fine_tune_type": self.fine_tune_type.value,
                "num_layers": self.num_layers,
                "lora_parameters": parameters | ({"keys": self.keys} if self.keys else {}),
                "iters": self.iterations,
                "learning_rate": self.learning_rate,
                "batch_size": self.batch_size,
                "seed": self.seed,
            },
            "recipe",
        )


def read_recipes(path: Path) -> dict[str, Recipe]:
    """The recipes by adapter id, in the file's order.

    Raises:
        RecipeError: the file is missing, is not TOML, or has a table that is not a recipe.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"expected recipes in TOML at {path}, but: {error}") from error
    recipes = {}
    for adapter_id, table in tables.items():
        try:
            recipes[adapter_id] = Recipe.model_validate(table)
        except ValidationError as error:
            raise RecipeError(f"expected a recipe in table {adapter_id} of {path}, but: {error}") from error
    return recipes
