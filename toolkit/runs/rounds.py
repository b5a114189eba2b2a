"""What further rounds need, checked before anything is trained: a judge that can label, and data that it can label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.errors import RecipeError
from toolkit.files import module_fingerprint
from toolkit.judging.templates import check_template_of
from toolkit.preferences.rows import PreferenceRow
from toolkit.recipe.schema import RoundsSection


def check_labelling(rounds: RoundsSection) -> None:
    """Raises RecipeError or DataError for a function, template or principles that labels cannot be made with."""
    kind, _, rest = rounds.labels.partition(":")
    module = rest.partition(":")[0]
    if kind == "python" and module_fingerprint(module) is None:
        raise RecipeError(f"there is no module {module!r}", where="rounds.labels", fix="put its folder on PYTHONPATH")
    check_template_of([rounds.labels], rounds.judge.template)
    if rounds.principles is not None:
        from toolkit.judging.options import JudgeOptions
        from toolkit.judging.principles import Labelling, load_principles
        from toolkit.recipe.training import ModelSection

        options = JudgeOptions(ModelSection(), rounds.judge)
        Labelling(rounds.labels, load_principles(rounds.principles), options).template()


def check_labelled_data(rounds: RoundsSection, rows: Sequence[PreferenceRow]) -> None:
    """Raises RecipeError where the training ``rows`` are too few, or have no gold reward to label by."""
    if rounds.prompts is not None and rounds.prompts > len(rows):
        raise RecipeError(
            f"a round asks for {rounds.prompts:,} training prompts, and there are {len(rows):,}",
            where="rounds.prompts",
            fix=f"at most {len(rows)}, or null for all of them",
        )
    if rounds.labels == "gold":
        from toolkit.preferences.gold import gold_is_known  # its word lists take a while to import

        known, reasons = gold_is_known(rows)
        if not known:
            raise RecipeError(
                reasons[0].partition(":")[0] if reasons else "the data has no gold reward",
                where="rounds.labels",
                fix="name a judge that labels: rm:MODEL, python:module:function, llm:MODEL or openai:MODEL@BASE_URL",
            )


def labels_spent(metrics: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What a stage of labels spent for each arm: labels, failures, ties and sampled tokens. Empty for other stages."""
    names = ("labels", "failed", "tied", "tokens")
    return {arm: {name: facts[name] for name in names} for arm, facts in metrics.get("arms", {}).items()}


def labels_in_all(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """The sums of :func:`labels_spent` over the stages of a manifest; empty without such a stage."""
    totals: dict[str, dict[str, int]] = {}
    for entry in stages.values():
        for arm, spent in entry.get("labels", {}).items():
            of_arm = totals.setdefault(arm, dict.fromkeys(spent, 0))
            for key, value in spent.items():
                of_arm[key] += value
    return totals
