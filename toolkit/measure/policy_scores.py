"""One policy by itself: its samples for a set of prompts, their KL from the reference, and what each judge says.

A judge that scores responses gives a score, the mean over a prompt's samples. A language model compares each sample
with one of the SFT policy, in both orders, and gives the preference for the policy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from toolkit.errors import NotFiniteError, StoreError
from toolkit.files import fingerprint, read_table, table_metadata, write_table
from toolkit.judging import llm, scorers
from toolkit.judging.responses import of_samples
from toolkit.measure.policies import SAMPLED_COLUMNS, EvaluationSettings, Policy, sample_policy
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy
from toolkit.models.resolve import ModelRef
from toolkit.preferences.samples import Sample, by_prompt, read_samples, stored_samples, write_samples
from toolkit.progress import Reporter

REFERENCE = "sft"
SAMPLE_COLUMNS = (*SAMPLED_COLUMNS, "kl_nats")


@dataclass(frozen=True)
class PromptScore:
    """What a judge says of a policy's responses to a prompt: a language model a ``preference``, the others a ``score``.

    Both are None where the policy diverged. ``kl_nats`` is the mean over the samples.
    """

    prompt_id: str
    judge: str
    score: float | None
    preference: float | None
    kl_nats: float | None


@dataclass(frozen=True)
class ScoreFiles:
    """Where a policy's samples and scores on a split lie. Files with another key are of earlier settings."""

    folder: Path
    name: str
    key: str

    @property
    def samples(self) -> Path:
        return self.folder / f"{self.name}-{self.key}.samples.parquet"

    def scores(self, judge: str, key: str) -> Path:
        return self.folder / f"{self.name}-{fingerprint([self.key, judge, key])}.scores.parquet"


def samples_with_kl(
    policy: Policy, reference: ModelRef, settings: EvaluationSettings, files: ScoreFiles, reporter: Reporter
) -> list[Sample] | None:
    """The policy's samples, from its file where it is there. None for a policy that diverged.

    It diverged if its weights, or its log-probabilities, are not finite.
    """
    if stored_samples(files.samples, SAMPLE_COLUMNS) is None:
        files.folder.mkdir(parents=True, exist_ok=True)
        try:
            drawn = sample_policy(policy, settings, reporter)
            drawn = [replace(sample, kl_nats=kl) for sample, kl in _kl(drawn, reference, settings, reporter)]
        except NotFiniteError:
            drawn = []
        if any(not math.isfinite(sample.kl_nats or 0.0) for sample in drawn):
            drawn = []
        write_samples(drawn, files.samples, SAMPLE_COLUMNS)
    samples = read_samples(files.samples, SAMPLE_COLUMNS, error=StoreError, fix="remove it and run again")
    return samples or None


def _kl(
    samples: Sequence[Sample], reference: ModelRef, settings: EvaluationSettings, reporter: Reporter
) -> Iterable[tuple[Sample, float]]:
    """Each sample with log pi / pi_ref at the sampling temperature, in nats per response."""
    if all(sample.policy_logp is None for sample in samples):  # the reference itself
        return [(sample, 0.0) for sample in samples]
    groups = by_prompt(samples)
    trees = [
        Tree(ids, [sample.response_ids for sample in groups[row.prompt_id]])
        for ids, row in zip(settings.prompts, settings.rows, strict=True)
    ]
    engine = settings.engine(load_policy(reference, settings.model))
    with reporter.task("score under the reference", len(samples)) as task:
        logps = engine.logps(trees, temperature=settings.section.temperature, advance=task.advance)
    pairs = []
    for row, of_prompt in zip(settings.rows, logps, strict=True):
        for sample, tokens in zip(groups[row.prompt_id], of_prompt, strict=True):
            assert sample.policy_logp is not None
            pairs.append((sample, sample.policy_logp - float(tokens.double().sum())))
    return pairs


def judge_policy(
    judge: str,
    spec: str,
    judge_key: str,
    samples: Sequence[Sample] | None,
    baseline: Sequence[Sample],
    settings: EvaluationSettings,
    files: ScoreFiles,
    reporter: Reporter,
) -> list[PromptScore]:
    """What a judge says of a policy's samples, from its file where every prompt has an answer.

    ``spec`` is how the judge is asked, ``judge`` its name in the table. ``baseline`` are the SFT policy's samples.
    Prompts that the judge failed on have no row, and are asked again next time.
    """
    path = files.scores(judge, judge_key)
    if (stored := _stored_scores(path)) is not None:
        return stored
    if samples is None:
        rows = [PromptScore(row.prompt_id, judge, None, None, None) for row in settings.rows]
    elif llm.is_language_model(spec):
        rows = _preferences(spec, samples, baseline, settings, reporter)
    else:
        rows = _scores(judge, spec, samples, settings)
    complete = "yes" if len(rows) == len(settings.rows) else "no"
    write_table([vars(row) for row in rows], path, {"complete": complete})
    return rows


def _stored_scores(path: Path) -> list[PromptScore] | None:
    """The scores of a file with an answer to every prompt. A damaged file counts as none, and is written anew."""
    if not path.is_file():
        return None
    try:
        complete = table_metadata(path).get("complete") == "yes"
        return [PromptScore(**row) for row in read_table(path)] if complete else None
    except (StoreError, TypeError):
        return None


def _scores(judge: str, spec: str, samples: Sequence[Sample], settings: EvaluationSettings) -> list[PromptScore]:
    responses = of_samples({"policy": samples}, settings.rows)
    scores = scorers.score_policies(spec, responses, settings.judge_options)["policy"]
    kl = _mean_kl(samples)
    pairs = zip(responses.prompt_ids, scores, strict=True)
    return [
        PromptScore(prompt_id, judge, fmean(values), None, kl[prompt_id])
        for prompt_id, values in pairs
        if all(map(math.isfinite, values))
    ]


def _preferences(
    judge: str,
    samples: Sequence[Sample],
    baseline: Sequence[Sample],
    settings: EvaluationSettings,
    reporter: Reporter,
) -> list[PromptScore]:
    responses = of_samples({"policy": samples, REFERENCE: baseline}, settings.rows)
    pairs = [("policy", REFERENCE)]
    judgements, _ = llm.judge_pairs(judge, pairs, responses, settings.judge_options, reporter)
    answers: dict[str, list[float | None]] = defaultdict(list)
    for judgement in judgements:
        answers[judgement.prompt_id].append(judgement.preference)
    kl, rows = _mean_kl(samples), []
    for prompt_id in responses.prompt_ids:
        known = [answer for answer in answers[prompt_id] if answer is not None]
        if known and len(known) == len(answers[prompt_id]):
            rows.append(PromptScore(prompt_id, judge, None, fmean(known), kl[prompt_id]))
    return rows


def _mean_kl(samples: Sequence[Sample]) -> dict[str, float]:
    return {prompt_id: fmean(s.kl_nats or 0.0 for s in group) for prompt_id, group in by_prompt(samples).items()}
