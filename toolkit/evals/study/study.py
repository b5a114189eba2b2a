"""``study.json``: what a study's table says about RM + PPO and DPO.

The functions take a :class:`StudyData`, whoever made it: a recorded table, or a runner that trained the policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.evals.best_of_n import best_of_n_weights
from toolkit.evals.judge_tests import MIN_COVERAGE
from toolkit.evals.study.comparing import score_row, win_row, wins_along
from toolkit.evals.study.controls import gap_rows
from toolkit.evals.study.crossed import crossed_means
from toolkit.evals.study.matching import Comparing, amount
from toolkit.evals.study.selection import (
    Candidates,
    Rule,
    candidates,
    coverage,
    mean_or_none,
    means,
    needed_points,
    point_facts,
    rule_of,
    shared_prompts,
)
from toolkit.evals.study.table import ArmScores, StudyData
from toolkit.evals.study.verdict import verdict
from toolkit.evals.verdict import ARMS, NAMES, SMALLEST_EFFECT

SCHEMA_VERSION = 1
EQUAL_BUDGETS = 0.05
FEW_SEEDS = 3


def study(
    data: StudyData,
    *,
    kl_limit: float | None = None,
    select_by: str | None = None,
    kl_grid: Sequence[float] | None = None,
    smallest_effect: float = SMALLEST_EFFECT,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The document ``study.json``.

    ``kl_limit`` bars policies from selection whose KL on dev prompts is above it, in both arms alike. ``select_by``
    names the judge that ranks; None takes all that decide. ``kl_grid`` are the KLs of the curve at equal KL; None takes
    points evenly over the shared range. Win rates within ``smallest_effect`` of one half are no practical difference.

    Raises:
        DataError: the arms share no prompts, or no policy can be chosen or compared.
    """
    rule = rule_of(data, select_by, kl_limit)
    prompts = _prompts(data, ARMS, rule)
    by_arm = candidates(data, ARMS, prompts["dev"], rule)
    arms = (by_arm[ARMS[0]], by_arm[ARMS[1]])
    compared = Comparing(arms, data.n_prompts["test"], data.deciding, data.indirect, smallest_effect)
    by_judge = {judge: replace(compared, judges=(j,)) for j, judge in enumerate(data.judges)}
    effort = effort_rows(compared)
    controls = {arm: paired(data, arm, rule, arms) for arm in sorted(data.arms) if arm not in ARMS}
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe,
        "splits": {
            split: {"n_prompts": n, "n_common": _n_common(data, split, rule)} for split, n in data.n_prompts.items()
        },
        "trials": [row for arm in ARMS for row in trial_rows(data, by_arm[arm], prompts)],
        "chosen": {arm: _chosen(data, by_arm[arm], prompts) for arm in ARMS},
        "verdict": verdict(compared, by_judge, effort, kl_grid, data.not_deciding),
        "effort": effort,
        "controls": [_control_row(data, pairs, rule) for pairs in controls.values()],
        "gap": gap_rows(data, by_arm | {arm: pairs[-1].arms[1] for arm, pairs in controls.items()}),
        "warnings": [*data.warnings, *_warnings(data, compared, rule)],
        "selection": {"judges": [data.judges[j] for j in rule.judges], "kl_limit": kl_limit},
    }


def _judges(data: StudyData, split: str, rule: Rule) -> tuple[int, ...]:
    """The judges that count on a split, by number: those that rank, and those that decide."""
    return rule.judges if split == "dev" else data.deciding


def _prompts(data: StudyData, arms: Sequence[str], rule: Rule) -> dict[str, NDArray[np.bool_]]:
    """The prompts of each split that the arms' mean scores are over."""
    return {split: shared_prompts(data, arms, split, _judges(data, split, rule)) for split in data.n_prompts}


def _n_common(data: StudyData, split: str, rule: Rule) -> int:
    """How many prompts of a split have rows of all policies of both arms."""
    return int((coverage(data, ARMS, split, _judges(data, split, rule)) == 1.0).sum())


# ---------------------------------------------------------------- trials and the chosen


def _by_judge(judges: Sequence[str], values_J: Any) -> dict[str, float | None]:
    return {judge: mean_or_none(np.array([value])) for judge, value in zip(judges, values_J, strict=True)}


def trial_rows(data: StudyData, arm: Candidates, prompts: Any) -> list[dict[str, Any]]:
    """One row for each setting, with its checkpoints and their seeds: the points of the report's frontier."""
    dev, test = means(arm.dev, prompts["dev"]), means(arm.test, prompts["test"])
    rows = []
    for (setting, points), best in zip(arm.trials, arm.best_of_trials, strict=True):
        checkpoints = [
            {
                **point_facts(arm.test if arm.test.measured[p] else arm.dev, int(p)),
                "dev_score": _by_judge(data.judges, dev[:, p]),
                "test_score": _by_judge(data.judges, test[:, p]),
                "seeds": _seed_rows(data.judges, arm.test if arm.test.measured[p] else arm.dev, int(p)),
            }
            for p in points
        ]
        rows.append(
            {
                "arm": arm.dev.arm,
                "setting": setting,
                "chosen": bool(best == arm.chosen),
                "best_checkpoint": arm.dev.points[best][1],
                "n_diverged": int((arm.dev.diverged | arm.test.diverged)[points].any(axis=0).sum()),
                "checkpoints": [{k: v for k, v in row.items() if k != "setting"} for row in checkpoints],
            }
        )
    return rows


def _seed_rows(judges: Sequence[str], arm: ArmScores, point: int) -> list[dict[str, Any]]:
    """Each seed's KL and mean score over the split's prompts; without a score where it diverged."""
    rows = []
    for k, seed in enumerate(arm.seeds):
        diverged = bool(arm.diverged[point, k])
        scores = [None] * len(judges) if diverged else [float(x) for x in np.nanmean(arm.scores[:, point, k], axis=1)]
        rows.append(
            {
                "seed": seed,
                "kl_nats": mean_or_none(arm.kl[point, k : k + 1]),
                "score": dict(zip(judges, scores, strict=True)),
                "diverged": diverged,
            }
        )
    return rows


def _chosen(data: StudyData, arm: Candidates, prompts: Any) -> dict[str, Any]:
    """The chosen policy, and its optimism: by how much its dev score was above its test score."""
    dev = means(arm.dev, prompts["dev"])[:, arm.chosen]
    test = means(arm.test, prompts["test"])[:, arm.chosen]
    return {
        **point_facts(arm.test, arm.chosen),
        "dev_score": _by_judge(data.judges, dev),
        "test_score": _by_judge(data.judges, test),
        "optimism": _by_judge(data.judges, dev - test),
        "n_trials": len(arm.trials),
        "n_diverged": int(arm.test.diverged[arm.chosen].sum()),
    }


# ---------------------------------------------------------------- effort


def effort_rows(compared: Comparing) -> list[dict[str, Any]]:
    """Expected best of n = 1..N trials of each arm, and the win rate at equal n, with intervals over seeds and prompts.

    The intervals hold the trials fixed: they are of these settings, and not of the space that they were drawn from.
    An arm with fewer trials has None beyond them. Empty where a trial's best checkpoint has no test rows.
    """
    best = (compared.arms[0].best_of_trials, compared.arms[1].best_of_trials)
    if not all(arm.test.measured[points].all() for arm, points in zip(compared.arms, best, strict=True)):
        return []
    weights = [best_of_n_weights(arm.select[points]) for arm, points in zip(compared.arms, best, strict=True)]
    n_both = min(len(w) for w in weights)
    first, second = (
        np.repeat(w[:n_both, None], len(arm.test.seeds), axis=1) for w, arm in zip(weights, compared.arms, strict=True)
    )
    both = compared.both_scores(best)
    if not both[0].shape[-1]:
        return []
    rates = wins_along(*both, first, second)
    rows: list[dict[str, Any]] = []
    for n in range(max(len(w) for w in weights)):
        rows.append({"n_trials": n + 1, **win_row(rates[n] if n < n_both else None), **dict.fromkeys(ARMS)})
    for side, (arm, scores) in enumerate(zip(ARMS, both, strict=True)):
        if len(scores) > 1:
            continue  # the scores of several judges have no common scale
        for row, mean in zip(rows, crossed_means(np.einsum("nt,tkm->nkm", weights[side], scores[0])), strict=False):
            row[arm] = score_row(mean)
    return rows


# ---------------------------------------------------------------- controls and warnings


def paired(data: StudyData, control: str, rule: Rule, arms: Sequence[Candidates]) -> list[Comparing]:
    """Each arm's chosen policy beside the control's, which is chosen among the control's own, on shared prompts."""
    own = candidates(data, (control,), shared_prompts(data, (control,), "dev", rule.judges), rule)[control]
    return [Comparing((arm, own), data.n_prompts["test"], data.deciding, data.indirect) for arm in arms]


def _control_row(data: StudyData, pairs: Sequence[Comparing], rule: Rule) -> dict[str, Any]:
    """A control's chosen policy, and the win rate of each arm's chosen policy over it; no part of the verdict."""
    best = {pair.arms[0].dev.arm: pair.best() for pair in pairs}
    against = {arm: {**win_row(mean), "n_prompts": mean.n_prompts if mean else 0} for arm, mean in best.items()}
    control = pairs[-1].arms[1].dev.arm
    prompts = _prompts(data, (control,), rule)
    return {"arm": control, "chosen": _chosen(data, pairs[-1].arms[1], prompts), "win_rate_of": against}


def _warnings(data: StudyData, compared: Comparing, rule: Rule) -> list[str]:
    said = []
    left_out = {"dev": " and are left out of the selection", "test": " and are left out of comparisons with these"}
    for split, n in data.n_prompts.items():
        common = _n_common(data, split, rule)
        if common < n:
            what = left_out[split]
            if split == "dev" and common < MIN_COVERAGE * n:
                what = ": a score counts by its difference from its prompt's mean"
            said.append(f"{n - common} of {n} {split} prompts lack rows of some policies{what}")
    said += [text for arm in compared.arms for text in _arm_warnings(arm)]
    trials = [len(arm.trials) for arm in compared.arms]
    if trials[0] != trials[1]:
        said.append(f"the arms had unequal tuning: {trials[0]} trials of RM + PPO, {trials[1]} of DPO")
    first, second = (mean_or_none(_budgets(arm)) for arm in compared.arms)
    if first is not None and second is not None and abs(first - second) > EQUAL_BUDGETS * max(first, second):
        texts = [amount("train_tokens", value) for value in (first, second)]
        said.append(
            f"the budgets differ by more than {EQUAL_BUDGETS:.0%}: {texts[0]} training tokens a trial for RM + PPO, "
            f"{texts[1]} for DPO"
        )
    return said


def _arm_warnings(arm: Candidates) -> list[str]:
    name, n_seeds, said = NAMES[arm.dev.arm], len(arm.dev.seeds), []
    if n_seeds == 1:
        said.append(f"{name} has one seed: there is no interval over seeds, and nothing is decided")
    elif n_seeds < FEW_SEEDS:
        said.append(f"{name} has {n_seeds} seeds: the intervals are rough and very wide; take 3 to 5")
    if (arm.test.diverged | arm.dev.diverged)[arm.chosen].any():
        said.append(f"the chosen policy of {name} diverged with some of its seeds")
    untested = int((~arm.test.measured[needed_points(arm.dev, arm.rank, arm.select)]).sum())
    if untested:
        said.append(f"{untested} policies of {name} have no test rows: the curves or the effort lack them")
    return said


def _budgets(arm: Candidates) -> Any:
    """Training tokens of each trial and seed: the most of its checkpoints."""
    tokens = [arm.dev.tokens[points] for _, points in arm.trials]
    return np.concatenate([np.where(np.isfinite(t), t, -np.inf).max(axis=0) for t in tokens])
