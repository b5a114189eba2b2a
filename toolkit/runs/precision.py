"""The precision that a run computes in: ``model.dtype: auto`` is decided before the first stage, and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from toolkit.engine.fast.processor import AUTO, fastest_dtype
from toolkit.recipe.files import LoadedRecipe, load_recipe


def load_for_run(name_or_path: str, sets: Sequence[str] = ()) -> LoadedRecipe:
    """:func:`load_recipe` for this machine: stages have keys, and the run has a record, of the precision itself.

    Raises RecipeError as it does.
    """
    loaded = load_recipe(name_or_path, sets)
    recipe = loaded.recipe
    if recipe.model.dtype != AUTO:
        return loaded
    model = recipe.model.model_copy(update={"dtype": fastest_dtype()})
    origins = loaded.origins | {"model.dtype": f"auto ({loaded.origins['model.dtype']})"}
    return replace(loaded, recipe=recipe.model_copy(update={"model": model}), origins=origins)


def slow_precision(loaded: LoadedRecipe) -> str | None:
    """What to say of a run in bfloat16 on a machine that converts to multiply it; None of any other."""
    if loaded.recipe.model.dtype != "bfloat16" or fastest_dtype() == "bfloat16":
        return None
    return "this machine has no products in bfloat16: float32 is several times as fast (model.dtype: float32, or auto)"
