"""Labels by written principles: AI feedback as in Constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 4.1).

Every pair of responses to a prompt is shown to a language model in both orders, with a principle: one that is drawn for
each comparison, or each in turn, and they vote.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Literal

import yaml

from toolkit.errors import DataError, RecipeError
from toolkit.judging.answers import Answer, Question
from toolkit.judging.llm import Usage, ask_all
from toolkit.judging.templates import load_template
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, prompt_id, soft_comparisons
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings, ModelSection

SHIPPED = ("hhh",)


@dataclass(frozen=True)
class Labelled:
    """Rows with at least one comparison, and what became of the comparisons that were asked for.

    ``n_failed`` comparisons have no label: a verdict is missing in one order at least. ``n_inconsistent`` of the others
    were decided one way in one order and the other way in the other.
    """

    rows: list[PreferenceRow]
    n_comparisons: int
    n_failed: int
    n_tied: int
    n_inconsistent: int
    usage: Usage


def load_principles(name_or_path: str) -> list[str]:
    """The shipped list ``hhh``, or a file: a YAML list of texts (``.yaml``, ``.yml``), or one principle on each line.

    Raises DataError where there is no such file, no principle, or one that comes twice.
    """
    if name_or_path in SHIPPED:
        source = resources.files("toolkit.judging").joinpath("assets", f"{name_or_path}.yaml")
        text, is_yaml = source.read_text("utf-8"), True
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise DataError(
                "there is no such file of principles", where=name_or_path, fix=f"name {', '.join(SHIPPED)}, or a file"
            )
        text, is_yaml = path.read_text(encoding="utf-8"), path.suffix in (".yaml", ".yml")
    if is_yaml:
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise DataError(f"this is no YAML: {error}", where=name_or_path) from error
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise DataError("principles are a list of texts", where=name_or_path, fix="write each behind a dash")
    else:
        found = [line for line in text.splitlines() if not line.startswith("#")]
    principles = [item.strip() for item in found if item.strip()]
    if not principles:
        raise DataError("there is no principle in this file", where=name_or_path, fix="write one on each line")
    twice = next((item for k, item in enumerate(principles) if item in principles[:k]), None)
    if twice is not None:
        raise DataError(f"a principle is there twice: {twice[:60]!r}", where=name_or_path, fix="keep one of them")
    return principles


def label_rows(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    judge: str,
    principles: Sequence[str],
    *,
    draw: Literal["one", "all"],
    labels: Literal["soft", "hard"],
    seed: int,
    settings: JudgeSettings,
    section: ModelSection,
    reporter: Reporter,
) -> Labelled:
    """Preference rows over all C(K,2) pairs of the distinct ``responses`` to each of ``prompts``.

    A verdict is the mean preference over both orders. ``draw="one"``: one principle, fixed by seed, prompt and pair;
    the label is its verdict. ``"all"``: the label is the vote, the share of principles whose verdict is for the first
    response, undecided ones counting half. ``labels="hard"`` takes the side of the majority, exactly one half being
    a tie. A pair of which any verdict failed is left out, and counted.

    Raises RecipeError for a template without a principle, ModelError for a judge that cannot be used.
    """
    default = "principle-logprob" if judge.startswith("llm:") else "principle"
    template = load_template(settings.template or default)
    if not template.principled:
        raise RecipeError(
            f"template {template.name!r} does not show the principle", where="--template", fix="use {{ principle }}"
        )
    distinct = [list(dict.fromkeys(texts)) for texts in responses]
    asked: list[tuple[int, int, int, list[tuple[Question, Question]]]] = []
    for row, (prompt, texts) in enumerate(zip(prompts, distinct, strict=True)):
        for i, j in combinations(range(len(texts)), 2):
            drawn = principles
            if draw == "one":
                rng = random.Random(f"{seed}/{prompt_id(prompt)}/{texts[i]}/{texts[j]}")
                drawn = [rng.choice(principles)]
            key = (judge, template.fingerprint, prompt)
            both = [(Question(*key, texts[i], texts[j], p), Question(*key, texts[j], texts[i], p)) for p in drawn]
            asked.append((row, i, j, both))
    wanted = [question for *_, both in asked for pair in both for question in pair]
    answers, usage = ask_all(judge, template, wanted, settings, section, reporter)

    comparisons: list[list[Comparison]] = [[] for _ in prompts]
    n_failed = n_tied = n_inconsistent = 0
    for row, i, j, both in asked:
        verdicts = [_verdict(answers[shown.key], answers[swapped.key]) for shown, swapped in both]
        values = [value for value, _ in verdicts if value is not None]
        if len(values) < len(verdicts):
            n_failed += 1
            continue
        n_inconsistent += any(not consistent for _, consistent in verdicts)
        p = values[0] if draw == "one" else sum(_side(value) for value in values) / len(values)
        p = _side(p) if labels == "hard" else p
        n_tied += p == 0.5
        comparisons[row] += soft_comparisons(i, j, p, judge)
    rows = [
        PreferenceRow(prompt_id(prompt), prompt, texts, found)
        for prompt, texts, found in zip(prompts, distinct, comparisons, strict=True)
        if found
    ]
    return Labelled(rows, len(asked), n_failed, n_tied, n_inconsistent, usage)


def _verdict(shown: Answer, swapped: Answer) -> tuple[float | None, bool]:
    """(preference for the first response over both orders, whether these agree); None where one of them failed."""
    if shown.value is None or swapped.value is None:
        return None, True
    other = 1.0 - swapped.value
    return (shown.value + other) / 2.0, _side(shown.value) == _side(other)


def _side(p: float) -> float:
    return 0.5 if abs(p - 0.5) < 1e-12 else float(p > 0.5)
