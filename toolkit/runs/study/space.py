"""The settings that a study's trials try: drawn from an arm's search space, the same ones for the same seed."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
from scipy.stats import qmc

from toolkit.errors import RecipeError
from toolkit.recipe.schema import SearchSpace

SIGNIFICANT_DIGITS = 3
MOST_POINTS = 20  # of the sequence for each setting that is asked for: rounding makes some equal


def draw_settings(space: SearchSpace, n: int, seed: int, *, where: str) -> list[dict[str, Any]]:
    """``n`` distinct settings of a search space.

    Where every setting has a list of values, they are drawn from the grid of all combinations without replacement.
    With a range they are points of a scrambled Halton sequence (Halton 1960; Owen 2017, 1706.02808), which covers the
    space more evenly than independent draws. The first n of n + 1 settings are those of n: more trials extend a study.

    Raises RecipeError where the space has fewer than ``n`` settings.

    >>> draw_settings({"beta": [0.1, 0.5]}, 2, seed=0, where="study.dpo")
    [{'beta': 0.1}, {'beta': 0.5}]
    """
    names = sorted(space)
    if all(isinstance(space[name], list) for name in names):
        grid = list(product(*(space[name] for name in names)))
        if n > len(grid):
            have = (
                f"has {len(grid)} setting{'s' if len(grid) > 1 else ''}"
                if names
                else "has only the recipe's own setting"
            )
            fix = "add values to it, or lower study.trials; both arms try the same number of settings"
            raise RecipeError(f"the search space {have}, and study.trials asks for {n}", where=where, fix=fix)
        order = np.random.default_rng(seed).permutation(len(grid))[:n]
        return [dict(zip(names, grid[i], strict=True)) for i in order]
    points = qmc.Halton(len(names), seed=seed).random(MOST_POINTS * n)
    distinct: dict[tuple[Any, ...], dict[str, Any]] = {}
    for point in points:
        values = {name: _value(space[name], u) for name, u in zip(names, point, strict=True)}
        distinct.setdefault(tuple(values.values()), values)
        if len(distinct) == n:
            return list(distinct.values())
    what = f"{len(points)} points of the search space have {len(distinct)} different settings, {n} are asked for"
    raise RecipeError(what, where=where, fix="widen its ranges (numbers are rounded to three digits), or list values")


def _value(values: Any, u: float) -> Any:
    """The value at the share ``u`` of a list or a range. Numbers of a range are rounded for people."""
    if isinstance(values, list):
        return values[int(u * len(values))]
    [(kind, (low, high))] = values.items()
    if kind == "log_uniform":
        return rounded(math.exp(math.log(low) + u * (math.log(high) - math.log(low))))
    return rounded(low + u * (high - low))


def rounded(value: float) -> float:
    """
    >>> rounded(0.00031622776)
    0.000316
    """
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
