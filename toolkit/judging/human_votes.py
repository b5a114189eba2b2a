"""A judge's win rates corrected by the votes of people on some of its prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from toolkit.errors import DataError
from toolkit.evals.prediction_powered import MIN_HUMAN, prediction_powered
from toolkit.judging.records import POOLED, Judgement, turned

Key = tuple[str, str]
ByPrompt = Callable[[Sequence[Judgement]], dict[str, float]]


@dataclass(frozen=True)
class Corrected:
    """Corrected win rates, and the judged pairs that have too few votes for one.

    A row has ``policy``, ``baseline``, ``judge`` and the fields of
    :class:`toolkit.evals.prediction_powered.PredictionPowered`; a pair that is left out has the first three and
    ``n_votes``, the number of its judged prompts that people voted on.
    """

    rows: list[dict[str, Any]]
    left_out: list[dict[str, Any]]


def corrected_win_rates(
    judgements: Sequence[Judgement], votes: Sequence[Judgement], preferences: ByPrompt, confidence: float
) -> Corrected:
    """A row for each (policy, baseline, judge) with the votes of people on ``MIN_HUMAN`` of its prompts or more.

    ``preferences`` gives the preference of each prompt: orders, repeats and people are averaged inside it. A vote whose
    prompt has another id here is known by the two responses, where their texts were recorded.

    Raises DataError where no (policy, baseline, judge) has enough votes.
    """
    judged = {(j.policy, j.baseline, j.prompt_id) for j in judgements}
    prompt_of = _prompts_by_responses(judgements)
    by_pair: dict[Key, list[Judgement]] = defaultdict(list)
    for vote in votes:
        vote = replace(vote, source=vote.source or vote.judge, judge=POOLED)
        for seen in (vote, turned(vote)):
            if (seen.policy, seen.baseline, seen.prompt_id) not in judged:
                seen = replace(seen, prompt_id=prompt_of.get(_responses(seen), seen.prompt_id))
            by_pair[seen.policy, seen.baseline].append(seen)
    groups: dict[tuple[str, str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[judgement.policy, judgement.baseline, judgement.judge].append(judgement)
    corrected = Corrected([], [])
    for (policy, baseline, judge), members in groups.items():
        names = {"policy": policy, "baseline": baseline, "judge": judge}
        of_judge, of_people = preferences(members), preferences(by_pair.get((policy, baseline), []))
        n_votes = len(of_judge.keys() & of_people.keys())
        if n_votes < MIN_HUMAN:
            corrected.left_out.append({**names, "n_votes": n_votes})
            continue
        human = np.array([of_people.get(prompt, np.nan) for prompt in of_judge])
        estimate = prediction_powered(human, np.array(list(of_judge.values())), confidence=confidence)
        corrected.rows.append({**names, **estimate.as_dict()})
    if not corrected.rows:
        raise _too_few(corrected, judgements, votes)
    return corrected


def _responses(j: Judgement) -> tuple[str, ...]:
    return j.policy, j.baseline, j.policy_hash, j.baseline_hash


def _prompts_by_responses(judgements: Sequence[Judgement]) -> dict[tuple[str, ...], str]:
    """The prompt of two responses, where they were recorded and are those to one prompt alone."""
    prompts: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for j in judgements:
        if j.policy_hash and j.baseline_hash:
            prompts[_responses(j)].add(j.prompt_id)
    return {responses: prompt for responses, of in prompts.items() if len(of) == 1 for prompt in of}


def _too_few(corrected: Corrected, judgements: Sequence[Judgement], votes: Sequence[Judgement]) -> DataError:
    """The error where no pair can be corrected: no vote is on a judged prompt of its pair, or too few are."""
    most = max((pair["n_votes"] for pair in corrected.left_out), default=0)
    if most == 0:
        judged = sorted({f"{j.policy} against {j.baseline}" for j in judgements})
        voted = sorted({f"{v.policy} against {v.baseline}" for v in votes})
        return DataError(
            "no vote is on a pair of systems and a prompt that was judged: people compared "
            f"{', '.join(voted[:3])}, the judge {', '.join(judged[:3])}",
            where="--human",
            fix="the votes need the systems' names and the prompts (or their ids) of the judged file",
        )
    return DataError(
        f"no pair has the votes of people on {MIN_HUMAN} of its judged prompts; the most are on {most}",
        where="--human",
        fix="ask people about more of the prompts",
    )
