"""Controls: further arms that say where the difference between RM + PPO and DPO comes from.

Each control changes one part of the way from DPO to RM + PPO. The gap is the sum of the steps from control to control,
in two measures that add up exactly: the win rate over DPO's chosen policy, and each judge's mean score. Every arm
stands with its chosen policy, on the test prompts that all of them have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.evals.intervals import Floats
from toolkit.evals.study.comparing import win_shares
from toolkit.evals.study.crossed import CrossedMean, crossed_means
from toolkit.evals.study.selection import Candidates
from toolkit.evals.study.table import StudyData
from toolkit.evals.verdict import ARMS

# The way from DPO to RM + PPO: what each arm has that the one before it lacks.
PATH = {
    "dpo": "",
    "online_dpo": "on-policy data and the reward model",
    "rloo": "reinforcement learning in place of the DPO loss",
    "rm_ppo": "the critic",
}
# Steps that lie beside the way.
BESIDE = (
    ("dpo", "online_dpo_gold", "on-policy data, labelled by the judge"),
    ("online_dpo", "online_dpo_gold", "labels by the judge in place of the reward model"),
    ("rm_ppo", "more_prompts", "further prompts"),
    ("sft", "rm_ppo", "what RM + PPO gains over SFT"),
    ("sft", "length_only", "what reinforcement learning for length alone gains over SFT"),
    ("length_only", "rm_ppo", "what RM + PPO gains beyond length alone"),
)
KNOWN = {*PATH, *(arm for first, second, _ in BESIDE for arm in (first, second))}


@dataclass(frozen=True)
class Step:
    """From one arm to another: ``kind`` is total, step (a part of the total) or beside."""

    kind: str
    first: str
    second: str
    what: str


def steps(arms: Sequence[str]) -> Iterator[Step]:
    """The steps between those arms that are there. Where an arm of the way lacks, its step joins the next one.

    >>> [(step.first, step.second, step.what) for step in steps(["rm_ppo", "dpo", "rloo"])][1:]
    [('dpo', 'rloo', 'on-policy data and the reward model; reinforcement learning in place of the DPO loss'), \
('rloo', 'rm_ppo', 'the critic')]
    """
    way = [arm for arm in PATH if arm in arms]
    if len(way) > 2:
        yield Step("total", ARMS[1], ARMS[0], "the whole gap")
        names = list(PATH)
        for first, second in zip(way, way[1:], strict=False):
            passed = names[names.index(first) + 1 : names.index(second) + 1]
            yield Step("step", first, second, "; ".join(PATH[arm] for arm in passed))
    for first, second, what in BESIDE:
        if first in arms and second in arms:
            yield Step("beside", first, second, what)


def gap_rows(data: StudyData, candidates: Mapping[str, Candidates]) -> list[dict[str, Any]]:
    """The ``gap`` of ``study.json``. ``candidates`` has both arms and every control. Empty without known controls.

    ``difference`` is that of the second arm minus the first. Its interval is over the seeds of both arms and prompts,
    and, for win rates, over the seeds of the DPO policy that both are compared with. ``probability`` is that of a
    difference above 0.
    """
    arms = [arm for arm in candidates if arm in KNOWN]
    wanted = list(steps(arms))
    if not wanted:
        return []

    def chosen(judges: Sequence[int]) -> dict[str, Floats]:
        """(judges, seeds, prompts) of each arm's chosen policy, on the prompts that all of them have."""
        scores = {arm: candidates[arm].test.scores[list(judges), candidates[arm].chosen] for arm in arms}
        there = np.all([np.isfinite(of_arm).all(axis=(0, 1)) for of_arm in scores.values()], axis=0)
        return {arm: of_arm[..., there] for arm, of_arm in scores.items()}

    by_deciding = chosen(data.deciding)
    of_dpo = by_deciding[ARMS[1]]
    over_dpo = {
        arm: None if arm == ARMS[1] else win_shares(scores[:, None], of_dpo[:, None])[0, 0]
        for arm, scores in by_deciding.items()
    }
    by_judge = {judge: chosen([j]) for j, judge in enumerate(data.judges)}
    rows = []
    for step in wanted:
        if of_dpo.shape[-1]:
            rows.append(_row(step, "win_rate", None, win_rate_step(over_dpo[step.first], over_dpo[step.second])))
        for judge, scores in by_judge.items():
            if scores[step.first].shape[-1]:
                rows.append(_row(step, "score", judge, score_step(scores[step.first][0], scores[step.second][0])))
    return rows


def score_step(first_KN: Floats, second_LN: Floats) -> CrossedMean:
    """The difference of two arms' mean scores, the second minus the first."""
    one, other = first_KN.mean(axis=0), second_LN.mean(axis=0)
    return crossed_means((other - first_KN)[None], (second_LN - one)[None])[0]


def win_rate_step(first_KMN: Floats | None, second_LMN: Floats | None) -> CrossedMean:
    """The difference of two arms' win rates over the same M policies of DPO. None is DPO, with a win rate of 1/2."""
    arms = [(-1.0, first_KMN), (1.0, second_LMN)]
    shares = [(sign, wins) for sign, wins in arms if wins is not None]
    if not shares:
        raise ValueError("the step goes from DPO to DPO")
    half = 0.5 * sum(sign for sign, wins in arms if wins is None)  # 0 where neither arm is DPO
    by_prompt = [sign * wins.mean(axis=(0, 1)) for sign, wins in shares]
    total_N = half + np.sum(by_prompt, axis=0)
    projections = [
        total_N - of_prompt + sign * wins.mean(axis=1)
        for (sign, wins), of_prompt in zip(shares, by_prompt, strict=True)
    ]
    projections.append(half + np.sum([sign * wins.mean(axis=0) for sign, wins in shares], axis=0))
    return crossed_means(*(projection[None] for projection in projections))[0]


def _row(step: Step, measure: str, judge: str | None, mean: CrossedMean) -> dict[str, Any]:
    low, high = mean.interval()
    return {
        "kind": step.kind,
        "from": step.first,
        "to": step.second,
        "what": step.what,
        "measure": measure,
        "judge": judge,
        "difference": mean.value,
        "ci_low": low,
        "ci_high": high,
        "probability": mean.probability_above(0.0),
        "n_prompts": mean.n_prompts,
    }
