"""``duel sweep``: many paired runs over a grid and seeds, sharing every stage that is equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from toolkit import pipeline
from toolkit.errors import RecipeError
from toolkit.progress import Reporter
from toolkit.recipe import load_recipe
from toolkit.store import fingerprint, read_json, write_json


def parse_grid(grid: Sequence[str]) -> list[tuple[str, list[str]]]:
    """``["dpo.beta=0.05,0.1"]`` -> ``[("dpo.beta", ["0.05", "0.1"])]``. Raises RecipeError where a part is missing."""
    out = []
    for text in grid:
        key, equals, values = text.partition("=")
        found = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not key.strip() or not found:
            raise RecipeError(f"{text!r} is no grid", where="--grid", fix="write it as dpo.beta=0.05,0.1,0.5")
        out.append((key.strip(), found))
    return out


def run_sweep(
    recipe: str,
    sets: list[str],
    grid: list[str],
    seeds: int,
    out: Path | None,
    reporter: Reporter,
    *,
    before_stage: Callable[[], None],
) -> list[dict[str, Any]]:
    """Runs every point and seed in a folder of its own below ``out``; writes and returns the rows of ``sweep.json``."""
    axes = parse_grid(grid)
    points = [dict(zip([key for key, _ in axes], values, strict=True)) for values in product(*(v for _, v in axes))]
    out = out or Path("runs") / f"{load_recipe(recipe, sets).recipe.name}-sweep"
    jobs = []
    for point in points:
        for seed in range(seeds):
            settings = {**point, "seed": str(seed)} if seeds > 1 else point
            loaded = load_recipe(recipe, [*sets, *(f"{key}={value}" for key, value in settings.items())])
            label = ",".join(f"{key}={value}" for key, value in settings.items()) or "default"
            safe = label.replace("/", "_")
            jobs.append((label, settings, loaded, out / (safe if len(safe) < 100 else fingerprint(settings))))
    rows = []
    for number, (label, settings, loaded, folder) in enumerate(jobs, start=1):
        reporter.overall = ""
        reporter.line(f"run {number} of {len(jobs)}: {label}")
        others = [other for *_, other in jobs if other != folder and other.is_dir()]
        pipeline.run(
            loaded, folder, reporter, reuse=others, command=["duel", "sweep", label], before_stage=before_stage
        )
        results = read_json(folder / "results.json")
        rows.append(
            {
                "settings": settings,
                "out": str(folder),
                "verdict": results["verdict"],
                "frontier": results["frontier"],
                "wall_s": {arm: facts["wall_s"] for arm, facts in results["cost"]["arms"].items()},
            }
        )
        write_json(out / "sweep.json", {"recipe": recipe, "runs": rows})
    return rows
