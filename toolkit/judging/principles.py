"""Labels by written principles: AI feedback as in Constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 4.1).

A language model sees every pair of responses to a prompt in both orders, with a principle. Either one principle is
drawn for each comparison, or all of them vote.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

from toolkit.errors import DataError, RecipeError
from toolkit.judging.answers import Answer, Question, Questions
from toolkit.judging.llm import Usage, ask_all, model_identity
from toolkit.judging.options import JudgeOptions
from toolkit.judging.templates import Template, load_template
from toolkit.preferences.loading import decoded
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, prompt_id, soft_comparisons
from toolkit.preferences.stored import StoredRows
from toolkit.progress import Reporter
from toolkit.recipe.judge_specs import SHIPPED_PRINCIPLES
from toolkit.recipe.yaml_values import read_yaml
from toolkit.storage.lazy import Computed


@dataclass(frozen=True)
class Labelling:
    """Who labels, by which principles, and what becomes a label.

    A verdict is the mean preference over both orders of a pair.

    ``draw="one"`` takes one principle, fixed by seed, prompt and pair, and its verdict is the label. ``"all"`` takes a
    vote: the label is the share of principles whose verdict is for the first response, undecided ones counting half.
    ``labels="hard"`` takes the side of the majority; exactly one half is a tie.
    """

    judge: str
    principles: Sequence[str]
    options: JudgeOptions
    draw: Literal["one", "all"] = "one"
    labels: Literal["soft", "hard"] = "soft"
    seed: int = 0

    def template(self) -> Template:
        """Raises RecipeError for a template that shows no principle."""
        default = "principle-logprob" if self.judge.startswith("llm:") else "principle"
        template = load_template(self.options.settings.template or default)
        if not template.principled:
            raise RecipeError(
                f"template {template.name!r} does not show the principle", where="--template", fix="use {{ principle }}"
            )
        return template

    def principles_for(self, prompt: Prompt, a: str, b: str) -> tuple[str, ...]:
        """The principles that two responses to a prompt are compared by."""
        if self.draw == "all":
            return tuple(self.principles)
        return (random.Random(f"{self.seed}/{prompt_id(prompt)}/{a}/{b}").choice(self.principles),)

    def label(self, verdicts: Sequence[float | None]) -> float | None:
        """The preference for the first response; None where a verdict is missing: a vote needs all its voices."""
        values = [value for value in verdicts if value is not None]
        if len(values) < len(verdicts):
            return None
        p = values[0] if self.draw == "one" else sum(_side(value) for value in values) / len(values)
        return _side(p) if self.labels == "hard" else p


@dataclass(frozen=True)
class Labelled:
    """Rows with at least one comparison, and what became of all comparisons that were asked for.

    ``n_failed`` comparisons have no label: at least one verdict is missing. The verdicts of ``n_inconsistent`` others
    changed with the order of the responses.
    """

    rows: Sequence[PreferenceRow]
    n_comparisons: int
    n_failed: int
    n_tied: int
    n_inconsistent: int
    usage: Usage | None  # None: no language model was asked


def load_principles(name_or_path: str) -> list[str]:
    """The shipped list ``hhh``, or a file: a YAML list of texts (``.yaml``, ``.yml``), or one principle on each line.

    Raises DataError where there is no such file, no principle, or one that comes twice.
    """
    if name_or_path in SHIPPED_PRINCIPLES:
        asset = resources.files("toolkit.judging").joinpath("assets", f"{name_or_path}.yaml")
        path = Path(str(asset))
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise DataError(
                "there is no such file of principles",
                where=name_or_path,
                fix=f"name {', '.join(SHIPPED_PRINCIPLES)}, or a file",
            )
    if path.suffix in (".yaml", ".yml"):
        items = read_yaml(path)
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise DataError("principles are a list of texts", where=name_or_path, fix="start each with a dash")
    else:
        lines = decoded(path.read_bytes(), str(path)).split("\n")
        items = [line for line in lines if not line.startswith("#")]
    principles = [item.strip() for item in items if item.strip()]
    if not principles:
        raise DataError("there is no principle in this file", where=name_or_path, fix="write one on each line")
    twice = next((item for k, item in enumerate(principles) if item in principles[:k]), None)
    if twice is not None:
        raise DataError(f"a principle is there twice: {twice[:60]!r}", where=name_or_path, fix="keep one of them")
    return principles


def label_rows(responses: Sequence[tuple[Prompt, Sequence[str]]], labelling: Labelling, reporter: Reporter) -> Labelled:
    """Preference rows over all C(K,2) pairs of the distinct responses to each prompt.

    A pair with a failed verdict is left out, and counted. Questions and rows wait on disk.

    Raises RecipeError for a template without a principle, ModelError for a judge that cannot be used.
    """
    judge, template = labelling.judge, labelling.template()
    distinct = Computed(responses, lambda of: (of[0], list(dict.fromkeys(of[1]))))
    asking = Asking(judge, template.fingerprint, model_identity(judge, labelling.options.model))
    questions = Questions()
    pairs = [_asked(questions, labelling, asking, prompt, texts) for prompt, texts in distinct]
    answers, usage = ask_all(judge, template, questions, labelling.options, reporter)

    rows, n_failed, n_tied, n_inconsistent = StoredRows(), 0, 0, 0
    for (prompt, texts), of_prompt in zip(distinct, pairs, strict=True):
        comparisons: list[Comparison] = []
        for pair in of_prompt:
            verdicts = [_verdict(answers[shown], answers[swapped]) for shown, swapped in pair.keys]
            p = labelling.label([value for value, _ in verdicts])
            if p is None:
                n_failed += 1
                continue
            n_inconsistent += any(not consistent for _, consistent in verdicts)
            n_tied += p == 0.5
            comparisons += soft_comparisons(pair.i, pair.j, p, judge)
        if comparisons:
            rows.add(PreferenceRow(prompt_id(prompt), prompt, texts, comparisons), [])
    return Labelled(rows, sum(map(len, pairs)), n_failed, n_tied, n_inconsistent, usage)


@dataclass(frozen=True)
class Asking:
    """Who is asked, by which template (its fingerprint), and the identity of the judge's model."""

    judge: str
    template: str
    model: str


class _Pair(NamedTuple):
    """Responses i < j to a prompt; for each principle the keys of the questions that show i first, and j first."""

    i: int
    j: int
    keys: list[tuple[str, str]]


def _asked(
    questions: Questions, labelling: Labelling, asking: Asking, prompt: Prompt, texts: Sequence[str]
) -> list[_Pair]:
    """The pairs of responses to a prompt, whose questions are added to ``questions``."""
    pairs = []
    for i, j in combinations(range(len(texts)), 2):
        a, b = texts[i], texts[j]
        keys = []
        for principle in labelling.principles_for(prompt, a, b):
            shown = Question(asking.judge, asking.template, prompt, a, b, principle, asking.model)
            keys.append((questions.add(shown), questions.add(replace(shown, first=b, second=a))))
        pairs.append(_Pair(i, j, keys))
    return pairs


def _verdict(shown: Answer, swapped: Answer) -> tuple[float | None, bool]:
    """(mean preference for the first response over both orders, whether both agree); None where one of them failed."""
    if shown.value is None or swapped.value is None:
        return None, True
    other = 1.0 - swapped.value
    return (shown.value + other) / 2.0, _side(shown.value) == _side(other)


def _side(p: float) -> float:
    return 0.5 if abs(p - 0.5) < 1e-12 else float(p > 0.5)
