"""The annotators who get a head of a reward model each."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.errors import RecipeError
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow


def annotators_of(rows: Sequence[PreferenceRow], annotator: str | None = None) -> list[str]:
    """The annotators that get a head. ``annotator`` is the one whose head gives the score; None takes the mean.

    Raises RecipeError where the rows cannot train a head for each, or have no such annotator.
    """
    where, fix = "reward_model.annotators", "annotators: pooled, or data that names who compared"
    comparisons = [comparison for row in rows for comparison in row.comparisons]
    unnamed = sum(not comparison.annotator for comparison in comparisons)
    if unnamed:
        raise RecipeError(f"{unnamed} of {len(comparisons)} comparisons name no annotator", where=where, fix=fix)
    names = sorted({comparison.annotator for comparison in comparisons})
    if len(names) < 2:
        raise RecipeError(f"one annotator compared all responses, {names[0]!r}", where=where, fix=fix)
    if not any(len(preferences) > 1 for row in rows for *_, preferences in splits.by_annotator(row)):
        what = f"no pair of responses has the comparisons of two of the {len(names)} annotators"
        fix = "annotators: pooled; heads of annotators who never overlap learn the prompts that each one saw"
        raise RecipeError(what, where=where, fix=fix)
    if annotator is not None and annotator not in names:
        what, fix = f"the training data has no annotator {annotator!r}", f"one of {', '.join(names)}"
        raise RecipeError(what, where="reward_model.annotator", fix=fix)
    return names
