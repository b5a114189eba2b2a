"""A judge's win rates corrected by the votes of people on some of its prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from toolkit.errors import DataError
from toolkit.evals.prediction_powered import prediction_powered
from toolkit.judging.records import POOLED, Judgement

Key = tuple[str, str]
ByPrompt = Callable[[Sequence[Judgement]], dict[str, float]]


def corrected_win_rates(
    judgements: Sequence[Judgement], votes: Sequence[Judgement], preferences: ByPrompt, confidence: float
) -> list[dict[str, Any]]:
    """A row for each (policy, baseline, judge) that people voted on, as
    :class:`toolkit.evals.prediction_powered.PredictionPowered` has it.

    ``preferences`` gives the preference of each prompt: orders, repeats and people are averaged inside it.

    Raises DataError where no vote is on a pair and a prompt that was judged, or on too few.
    """
    by_pair: dict[Key, list[Judgement]] = defaultdict(list)
    for vote in votes:
        by_pair[vote.policy, vote.baseline].append(replace(vote, source=vote.source or vote.judge, judge=POOLED))
        by_pair[vote.baseline, vote.policy].append(
            replace(_turned(vote), source=vote.source or vote.judge, judge=POOLED)
        )
    groups: dict[tuple[str, str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        if (judgement.policy, judgement.baseline) in by_pair:
            groups[judgement.policy, judgement.baseline, judgement.judge].append(judgement)
    rows = []
    for (policy, baseline, judge), members in groups.items():
        of_judge, of_people = preferences(members), preferences(by_pair[policy, baseline])
        if not of_judge.keys() & of_people.keys():
            continue
        human = np.array([of_people.get(prompt, np.nan) for prompt in of_judge])
        estimate = prediction_powered(human, np.array(list(of_judge.values())), confidence=confidence)
        rows.append({"policy": policy, "baseline": baseline, "judge": judge, **estimate.as_dict()})
    if not rows:
        judged = sorted({f"{j.policy} against {j.baseline}" for j in judgements})
        voted = sorted({f"{v.policy} against {v.baseline}" for v in votes})
        raise DataError(
            "no vote is on a pair of systems and a prompt that was judged: people compared "
            f"{', '.join(voted[:3])}, the judge {', '.join(judged[:3])}",
            where="--human",
            fix="the votes need the systems' names and the prompts (or their ids) of the judged file",
        )
    return rows


def _turned(vote: Judgement) -> Judgement:
    """The same vote seen from the other system."""
    preference = None if vote.preference is None else 1.0 - vote.preference
    order = None if vote.order is None else 1 - vote.order
    return replace(
        vote,
        policy=vote.baseline,
        baseline=vote.policy,
        preference=preference,
        order=order,
        policy_hash=vote.baseline_hash,
        baseline_hash=vote.policy_hash,
        policy_length=vote.baseline_length,
        baseline_length=vote.policy_length,
    )
