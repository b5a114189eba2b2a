"""The one way to ask a judge of any kind to compare policies.

A judge is ``gold``, ``rm:MODEL``, ``implicit:POLICY,REFERENCE`` or ``python:MODULE:FUNCTION``, which score responses;
``llm:MODEL`` or ``openai:MODEL@BASE_URL``, language models that compare; or ``file:PATH``, recorded judgements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.errors import ModelError, RecipeError
from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.judging import llm, scorers
from toolkit.judging.options import JudgeOptions
from toolkit.judging.recorded import MatchedJudgements, PolicyScores, matched, signals_by_answers
from toolkit.judging.records import Judgement, one_way, read_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.models.resolve import resolve
from toolkit.progress import Reporter
from toolkit.recipe.judge_specs import judge_problem, shown_judge


def judge_pairs(
    spec: str,
    pairs: Sequence[tuple[str, str]],
    responses: PolicyResponses,
    options: JudgeOptions,
    reporter: Reporter,
    *,
    known_scores: PolicyScores | None = None,
) -> tuple[list[Judgement], llm.Usage | None]:
    """A judge's judgements of ``(policy, baseline)`` pairs, and what they took where a language model was asked.

    A judge that scores compares every sample of the one with every sample of the other; a language model compares the
    k-th samples, in both orders. ``known_scores`` are the scores of a judge whose scores the caller has already. Of a
    file, the judgements of these responses are returned (:func:`toolkit.judging.recorded.matched`).

    Raises RecipeError and DataError for a judge that does not exist or cannot judge, ModelError for a model that cannot
    be used.
    """
    kind, _, rest = spec.partition(":")
    check_judge(spec)
    if kind == "file":
        return of_file(rest, pairs, responses, reporter).matching, None
    if llm.is_language_model(spec):
        return llm.judge_pairs(spec, pairs, responses, options, reporter)
    if known_scores is None:
        reporter.line(f"judge {spec}")
        known_scores = scorers.score_policies(spec, responses, options)
    compared = (scorers.compare(spec, policy, baseline, responses, known_scores) for policy, baseline in pairs)
    return [judgement for judgements in compared for judgement in judgements], None


@dataclass(frozen=True)
class Judged:
    """What several judges said. ``warnings`` are about judgements from files, ``dependent`` gives the reason why a
    judge in a file is a training signal by another name.
    """

    judgements: list[Judgement]
    usages: list[llm.Usage]
    warnings: list[str]
    dependent: dict[str, str]


def ask_judges(
    specs: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    responses: PolicyResponses,
    options: JudgeOptions,
    reporter: Reporter,
    *,
    known_scores: Mapping[str, PolicyScores] | None = None,
) -> Judged:
    """:func:`judge_pairs` of several judges, one after the other. ``known_scores`` are by judge."""
    judged = Judged([], [], [], {})
    silent: dict[str, str] = {}
    for spec in specs:
        check_judge(spec)
    for spec in specs:
        kind, _, file = spec.partition(":")
        if kind == "file":
            recorded = of_file(file, pairs, responses, reporter)
            judged.judgements.extend(recorded.matching)
            judged.warnings.extend(recorded.notes(file))
            judged.dependent.update(signals_by_answers(recorded.matching, responses, known_scores or {}))
        else:
            scores = (known_scores or {}).get(spec)
            of_judge, usage = judge_pairs(spec, pairs, responses, options, reporter, known_scores=scores)
            judged.judgements.extend(of_judge)
            judged.usages.extend([usage] if usage is not None else [])
            silent |= silence(spec, of_judge, usage)
    if specs and len(silent) == len(specs):
        refuse_silence(silent)
    judged.warnings.extend(f"{spec} gave no answer: {reason}" for spec, reason in silent.items())
    return judged


def check_judge(spec: str) -> None:
    """Raises RecipeError for a judge that is not written as one is, or with a password in its address."""
    problem = judge_problem(spec)
    if problem is not None:
        raise RecipeError(f"{shown_judge(spec)!r} {problem[0]}", where="judge", fix=problem[1])


def silence(spec: str, judgements: Sequence[Judgement], usage: llm.Usage | None) -> dict[str, str]:
    """The judge with how often and why it failed, where it never gave an answer; otherwise nothing."""
    failures = llm.most_frequent(j.error for j in judgements if j.preference is None)
    if usage is not None:
        n, failures, is_silent = usage.n_failed, usage.failures, usage.silent
    else:
        n = sum(failures.values())
        is_silent = bool(judgements) and n == len(judgements)
    reasons = "; ".join(f"{times:,} x {reason}" for reason, times in failures.items())
    return {spec: f"all {n:,} questions failed: {reasons}"} if is_silent else {}


def refuse_silence(silent: Mapping[str, str]) -> None:
    """Raises ModelError where judges gave no answer at all; nothing where there is none of them."""
    if silent:
        what = "; ".join(f"{spec} gave no answer: {reason}" for spec, reason in silent.items())
        raise ModelError(
            what,
            where="judge",
            fix="mend the judge and run the command again: every question is asked again, and nothing else is computed "
            "twice",
        )


def of_file(
    file: str, pairs: Sequence[tuple[str, str]], responses: PolicyResponses, reporter: Reporter
) -> MatchedJudgements:
    """The judgements of a file that are of these responses; what is left out or not verified is said.

    A file may call either of two the policy: they come as in ``pairs``.
    """
    recorded = matched(one_way(read_judgements([file]), pairs), responses)
    for note in recorded.notes(file):
        reporter.line(note)
    return recorded


def name_training_signals(
    specs: Sequence[str], fingerprints: Mapping[str, Sequence[str]]
) -> tuple[list[str], list[str]]:
    """The judges, each once, and warnings: a training signal that was named by its models goes by its own name.

    ``fingerprints`` are those of the models behind each training signal of the run: ``rm`` has its reward model,
    ``implicit`` its policy and reference. As a judge such a signal cannot decide between the arms.
    """
    names, warnings = [], []
    for spec in specs:
        kind, _, models = spec.partition(":")
        if kind in fingerprints and models:
            named = resolve(models.split(",")[0].strip()).fingerprint
            if named == fingerprints[kind][0]:  # DPO's policy is its reward, whatever it is compared with
                warnings.append(f"{spec} is {TRAINING_SIGNALS[kind]}: as a judge it is called {kind}")
                spec = kind
        names.append(spec)
    return list(dict.fromkeys(names)), warnings
