"""The one way to ask a judge of any kind to compare policies.

A judge is ``gold``, ``rm:MODEL``, ``implicit:POLICY,REFERENCE`` or ``python:MODULE:FUNCTION``, which score responses;
``llm:MODEL`` or ``openai:MODEL@BASE_URL``, language models that compare; or ``file:PATH``, recorded judgements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.judging import llm, scorers
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, read_judgements, response_hash
from toolkit.judging.responses import PolicyResponses
from toolkit.models.resolve import resolve
from toolkit.progress import Reporter

PolicyScores = Mapping[str, scorers.Scores]  # by policy


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
    file, the judgements of these responses are returned (:func:`of_these_responses`).

    Raises RecipeError and DataError for a judge that does not exist or cannot judge, ModelError for a model that cannot
    be used.
    """
    kind, _, rest = spec.partition(":")
    if kind == "file":
        return of_these_responses(read_judgements([rest]), responses, rest, reporter), None
    if llm.is_language_model(spec):
        return llm.judge_pairs(spec, pairs, responses, options, reporter)
    if known_scores is None:
        reporter.line(f"judge {spec}")
        known_scores = scorers.score_policies(spec, responses, options)
    compared = (scorers.compare(spec, policy, baseline, responses, known_scores) for policy, baseline in pairs)
    return [judgement for judgements in compared for judgement in judgements], None


def of_these_responses(
    judgements: Sequence[Judgement], responses: PolicyResponses, file: str, reporter: Reporter
) -> list[Judgement]:
    """The recorded judgements that are of these policies' responses; what is left out is counted and said.

    A judgement names its responses by their hashes. One that records none is taken by its prompt and policies, and
    counted as not verified: it may be of other samples of the same policies.
    """
    hashes = {
        (policy, prompt_id): {response_hash(text) for text in texts}
        for policy, of_prompt in responses.texts.items()
        for prompt_id, texts in zip(responses.prompt_ids, of_prompt, strict=True)
    }
    matching, unverified, elsewhere, other_texts = [], 0, 0, 0
    for j in judgements:
        sides = [
            (hashes.get((j.policy, j.prompt_id)), j.policy_hash),
            (hashes.get((j.baseline, j.prompt_id)), j.baseline_hash),
        ]
        if any(known is None for known, _ in sides):
            elsewhere += 1
        elif any(recorded and known is not None and recorded not in known for known, recorded in sides):
            other_texts += 1
        else:
            matching.append(j)
            unverified += not all(recorded for _, recorded in sides)
    notes = {
        f"{elsewhere} are of other prompts or policies and were left out": elsewhere,
        f"{other_texts} are of other responses to these prompts and were left out": other_texts,
        f"{unverified} do not record which responses they are of": unverified,
    }
    for note, count in notes.items():
        if count:
            reporter.line(f"{file}: of {len(judgements)} judgements {note}")
    return matching


def ask_judges(
    specs: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    responses: PolicyResponses,
    options: JudgeOptions,
    reporter: Reporter,
    *,
    known_scores: Mapping[str, PolicyScores] | None = None,
) -> tuple[list[Judgement], list[llm.Usage]]:
    """:func:`judge_pairs` of several judges, one after the other. ``known_scores`` are by judge."""
    judgements: list[Judgement] = []
    usages: list[llm.Usage] = []
    for spec in specs:
        scores = (known_scores or {}).get(spec)
        of_judge, usage = judge_pairs(spec, pairs, responses, options, reporter, known_scores=scores)
        judgements += of_judge
        usages += [usage] if usage is not None else []
    return judgements, usages


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
