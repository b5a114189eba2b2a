"""The accuracy of a run's reward model before the run's evaluation: ``duel run --until reward_model`` ends with it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from toolkit.measure.explicit import explicit_rewards
from toolkit.measure.options import ScoringOptions
from toolkit.measure.reading import ReadingOptions
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.schema import Recipe


def held_out_accuracy(run: Path, recipe: Recipe, reporter: Reporter) -> dict[str, Any] | None:
    """``{accuracy, accuracy_ci, n_comparisons, n_prompts}`` of the reward model of ``run`` on its held-out comparisons.

    None for a reward model of steps, whose accuracy is that of its steps, and where there is no comparison.
    """
    data = run / "data" / "eval.parquet"
    if recipe.reward_model.kind == "process":
        return None
    rows = from_parquet(data)
    reading = ReadingOptions(
        plain=isinstance(rows[0].prompt, str),
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        max_response_tokens=recipe.data.max_response_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        summary = explicit_rewards(
            str(run / "reward_model" / "model"),
            str(data),
            reading,
            ScoringOptions(recipe.model.dtype),
            out=Path(folder) / "rewards.parquet",
            reporter=reporter,
        )
    if summary["accuracy"] is None:
        return None
    return {name: summary[name] for name in ("accuracy", "accuracy_ci", "n_comparisons", "n_prompts")}
