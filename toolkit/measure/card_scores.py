"""The rewards on a reward model's card: of a model, of a function, of the gold reward, and of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.engine import cache
from toolkit.errors import RecipeError
from toolkit.files import module_fingerprint
from toolkit.judging.options import JudgeOptions
from toolkit.judging.scorers import judge_identity, score
from toolkit.measure.explicit import score_reading
from toolkit.measure.opinion_probe import opinion_rows
from toolkit.measure.options import ScoringOptions
from toolkit.measure.passes import StoredPass
from toolkit.measure.reading import (
    DATA,
    EncodedRow,
    EncodedRows,
    Reading,
    ReadingOptions,
    read,
    read_data,
    reading_counts,
)
from toolkit.measure.rewards import PolicyPair, RewardOptions, resolve_pair
from toolkit.measure.summary import check_finite
from toolkit.models.load import reads_pairs
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow
from toolkit.progress import Reporter
from toolkit.recipe.judge_specs import judge_problem, shown_judge
from toolkit.storage.lazy import Computed

Rewards = list[NDArray[np.float64]]  # by row: [K], one reward for each response


@dataclass(frozen=True)
class CardRows:
    """The rows that are scored: the data's, and those of the probes.

    ``reading`` has the ids of both where a model reads them, ``pair`` the policy of the implicit reward and its
    reference.
    """

    rows: Sequence[PreferenceRow]
    probes: list[PreferenceRow]
    counts: dict[str, int]
    reading: Reading | None
    pair: PolicyPair | None


@dataclass(frozen=True)
class Scored:
    """The rewards of the data's responses, and of those of the probes."""

    data: Rewards
    probes: Rewards


@dataclass(frozen=True)
class CardRewards:
    """The rewards of all responses; ``implicit`` is None where no policy was named."""

    explicit: Scored
    implicit: Scored | None


def is_function(model: str) -> bool:
    """Whether a function of text gives the rewards, and no model does."""
    return model == "gold" or model.startswith("python:")


def split_pair(implicit: str) -> tuple[str, str]:
    """POLICY,REFERENCE as two names. Raises RecipeError for anything else."""
    policy, comma, reference = (part.strip() for part in implicit.partition(","))
    if not (policy and comma and reference) or "," in reference:
        raise RecipeError(f"{implicit!r} is not POLICY,REFERENCE", where="--implicit", fix="name both, with a comma")
    return policy, reference


def scorer_identity(model: str, implicit: str | None) -> list[str | None]:
    """What tells one scorer from another. Raises ModelError where a model is missing."""
    models: list[str | None] = [None] if is_function(model) else [resolve(model).fingerprint]
    if implicit is not None:
        models += [None if name == "none" else resolve(name).fingerprint for name in split_pair(implicit)]
    code = module_fingerprint(model.split(":")[1]) if model.startswith("python:") else None
    return [model, implicit, code, *models]


def card_rows(
    model: str, data: str, implicit: str | None, of_pair: RewardOptions, reading: ReadingOptions, reporter: Reporter
) -> CardRows:
    """The rows of the data that every scorer takes, in the tokens of the policy, or of the reward model.

    ``implicit`` is POLICY,REFERENCE. Raises what reading the data and resolving the models raise.
    """
    pair = None
    if implicit is not None:
        policy, reference = split_pair(implicit)
        pair = resolve_pair(policy, reference, of_pair, reporter)
        tokens = read(data, pair.tokenizer, policy, reading, compared=True, reporter=reporter)
    elif not is_function(model):
        ref = resolve(model)
        tokens = read(
            data, load_tokenizer(ref), model, reading, pair=reads_pairs(ref), compared=True, reporter=reporter
        )
    else:
        read_whole = read_data(data, reading, reporter)
        rows = splits.limit(read_whole.rows, reading.limit, 0)
        return CardRows(rows, opinion_rows(rows), reading_counts(read_whole.report), None, None)
    of_data = Computed(tokens.rows, lambda row: row.row)
    probes = opinion_rows(of_data)
    encoded = (
        EncodedRow(row, tokens.encoder.encode(row.prompt, row.responses, reading.max_response_tokens), DATA, [DATA] * 2)
        for row in probes
    )
    both = replace(tokens, rows=EncodedRows.of(chain(tokens.rows, encoded)))
    return CardRows(of_data, probes, tokens.counts, both, pair)


def card_rewards(
    model: str, rows: CardRows, max_response_tokens: int, scoring: ScoringOptions, work: Path, reporter: Reporter
) -> CardRewards:
    """The rewards of all responses. A model's are stored in ``work``, and not computed twice.

    Raises ModelError for rewards that are not finite.
    """
    if is_function(model):
        explicit = _by_function(model, [*rows.rows, *rows.probes], scoring)
    else:
        assert rows.reading is not None  # card_rows read them for this model
        explicit = score_reading(model, rows.reading, max_response_tokens, scoring, work, reporter)
    implicit = None
    if rows.pair is not None and rows.reading is not None:
        rewards = _implicit(rows.pair, rows.reading, scoring, work, reporter)
        implicit = _scored(rewards, len(rows.rows), rows.pair.policy.spec)
    return CardRewards(_scored(explicit, len(rows.rows), model), implicit)


def _scored(rewards: Rewards, n: int, model: str) -> Scored:
    """The rewards of the data's ``n`` rows, and of the probes. Raises ModelError for one that is not finite."""
    for of_rows in (rewards[:n], rewards[n:]):
        check_finite(of_rows, model)
    return Scored(rewards[:n], rewards[n:])


def _by_function(model: str, rows: Sequence[PreferenceRow], scoring: ScoringOptions) -> Rewards:
    prompts, responses = [row.prompt for row in rows], [row.responses for row in rows]
    scores = score(model, prompts, responses, JudgeOptions(scoring.model, token_budget=scoring.batch_tokens))
    return [np.array(values, dtype=np.float64) for values in scores]


def check_scores(judge: str) -> None:
    """Raises RecipeError for a judge that does not score or is not written as one is, ModelError for one whose model is
    missing."""
    if judge.partition(":")[0] not in ("gold", "python", "rm", "implicit") or judge_problem(judge) is not None:
        fix = "use gold, rm:MODEL, implicit:POLICY,REFERENCE or python:MODULE:FUNCTION"
        raise RecipeError(f"{shown_judge(judge)!r} does not score responses", where="--judge", fix=fix)
    judge_identity(judge)


def judge_scores(judge: str, rows: Sequence[PreferenceRow], scoring: ScoringOptions) -> Rewards:
    """A judge's scores of all responses. Raises RecipeError for a judge that does not score, ModelError for a score
    that is not finite."""
    scores = _by_function(judge, rows, scoring)
    check_finite(scores, judge)
    return scores


def _implicit(pair: PolicyPair, reading: Reading, scoring: ScoringOptions, work: Path, reporter: Reporter) -> Rewards:
    """The reward that the policy's loss defines, of each response."""
    policy = _sums(StoredPass(pair.policy, "policy", reading.trees, pair.tokenizer, work, scoring), reporter)
    reference = [[0.0] * len(values) for values in policy]
    if pair.reference is not None:
        folder = cache.reference_folder()
        stored = StoredPass(pair.reference, "reference", reading.trees, pair.tokenizer, folder, scoring)
        reference = _sums(stored, reporter)
    return [
        np.array(
            [
                pair.reward(a - b, len(ids))
                for a, b, ids in zip(of_policy, of_reference, row.encoded.tree.response_ids, strict=True)
            ]
        )
        for of_policy, of_reference, row in zip(policy, reference, reading.rows, strict=True)
    ]


def _sums(stored: StoredPass, reporter: Reporter) -> list[list[float]]:
    """For each row, the log-probability of each response in nats."""
    return [
        [float(values.astype(np.float64).sum()) for values in of_row]
        for block in stored.logps(reporter)
        for of_row in block
    ]
