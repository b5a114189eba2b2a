"""Which setting and checkpoint of an arm is chosen: by one rule, the highest mean score on dev prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError, nearest
from toolkit.evals.intervals import Floats
from toolkit.evals.judge_tests import MIN_COVERAGE
from toolkit.evals.study.frontier import upper_hull
from toolkit.evals.study.table import ArmScores, StudyData


@dataclass(frozen=True)
class Rule:
    """How both arms choose: the judges (by number) whose scores on dev prompts rank, and the highest KL on them."""

    judges: tuple[int, ...]
    kl_limit: float | None = None


def rule_of(data: StudyData, select_by: str | None, kl_limit: float | None) -> Rule:
    """The rule: one judge, or all that no arm was trained on. Raises DataError for a judge that the table lacks."""
    if select_by is None:
        return Rule(data.deciding, kl_limit)
    if select_by not in data.judges:
        fix = nearest(select_by, data.judges)
        raise DataError(f"the table has no judge {select_by!r} to select by", where="selection on dev", fix=fix)
    return Rule((data.judges.index(select_by),), kl_limit)


@dataclass(frozen=True)
class Candidates:
    """One arm's points with the dev scores that rank them.

    ``rank`` (P,) is what ranks them, NaN without dev rows. ``select`` is the same, but -inf for points that cannot be
    chosen: without dev rows, or beyond the KL limit. ``on_frontier``: points for the curves, which need dev and test
    rows, and no seed that diverged.
    """

    dev: ArmScores
    test: ArmScores
    rank: Floats
    select: Floats
    on_frontier: NDArray[np.bool_]

    @property
    def chosen(self) -> int:
        return int(np.argmax(self.select))

    @property
    def trials(self) -> list[tuple[str, NDArray[np.int64]]]:
        """The settings with the indices of their points."""
        return trials_of(self.dev)

    @property
    def best_of_trials(self) -> NDArray[np.int64]:
        """The point of each trial that is best on dev."""
        return best_of_trials(self.dev, self.select)


def trials_of(arm: ArmScores) -> list[tuple[str, NDArray[np.int64]]]:
    """The settings of an arm with the indices of their points."""
    names = np.array([setting for setting, _ in arm.points])
    return [(str(name), np.flatnonzero(names == name)) for name in dict.fromkeys(names)]


def best_of_trials(dev: ArmScores, select: Floats) -> NDArray[np.int64]:
    """The point of each trial that is best on dev."""
    return np.array([points[np.argmax(select[points])] for _, points in trials_of(dev)])


def needed_points(dev: ArmScores, rank: Floats, select: Floats) -> NDArray[np.int64]:
    """The points that the verdict needs on test prompts: the best of each trial, and those on an arm's frontiers.

    The frontiers are those over KL and training tokens, by dev scores, with both of their ends. Seconds differ from
    call to call, and must not choose what is evaluated: the comparison at equal wall time takes what is there.
    """
    needed = {int(point) for point in best_of_trials(dev, select)}
    usable = np.flatnonzero(np.isfinite(rank) & ~dev.diverged.any(axis=1))
    for x_PK in (dev.kl, dev.tokens):
        on_axis = usable[np.isfinite(x_PK[usable]).all(axis=1)]
        needed |= {int(point) for point in on_axis[upper_hull(np.sqrt(x_PK[on_axis].mean(axis=1)), rank[on_axis])]}
    return np.array(sorted(needed), dtype=np.int64)


@dataclass(frozen=True)
class DevResult:
    """What dev prompts say of an arm: the chosen (setting, checkpoint), and those to evaluate on test prompts."""

    chosen: tuple[str, int]
    needed: list[tuple[str, int]]


def on_dev(data: StudyData, arms: Sequence[str], rule: Rule) -> dict[str, DevResult]:
    """For each arm what is chosen and what the verdict needs on test prompts, from its dev rows alone."""
    ranked = ranks(data, arms, shared_prompts(data, arms, "dev", rule.judges), rule.judges)
    results = {}
    for arm in arms:
        dev = data.arms[arm]["dev"]
        select = within_limit(dev, ranked[arm], rule.kl_limit)
        needed = [dev.points[point] for point in needed_points(dev, ranked[arm], select)]
        results[arm] = DevResult(dev.points[int(np.argmax(select))], needed)
    return results


def means(scores: ArmScores, prompts: NDArray[np.bool_]) -> Floats:
    """Mean score (judges, points) over seeds and prompts; NaN where there are no rows."""
    return _mean(scores.on(prompts), (2, 3))


def _mean(values: Floats, axis: tuple[int, ...]) -> Floats:
    """The mean of what is there; NaN where nothing is."""
    count = np.isfinite(values).sum(axis=axis)
    total = np.nansum(values, axis=axis)
    return np.asarray(np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0))


def ranks(
    data: StudyData, arms: Sequence[str], dev_prompts: NDArray[np.bool_], judges: tuple[int, ...]
) -> dict[str, Floats]:
    """What ranks each arm's points (P,) on dev prompts; NaN for those without dev rows.

    With one judge it is the mean score; with several the mean of their standardised scores, where each judge's mean and
    spread are those of all points of these arms. Where policies lack some of the prompts, each score counts by its
    difference from the mean of its prompt, so that nobody gains by missing the hard ones.
    """
    scores = {arm: data.arms[arm]["dev"].on(dev_prompts)[list(judges)] for arm in arms}
    if any(np.isnan(scores[arm][:, data.arms[arm]["dev"].measured]).any() for arm in arms):
        # (judges, policies, prompts) of all arms
        policies = [of_arm.reshape(len(judges), -1, of_arm.shape[-1]) for of_arm in scores.values()]
        by_prompt_JN = _mean(np.concatenate(policies, axis=1), (1,))
        scores = {arm: of_arm - by_prompt_JN[:, None, None] for arm, of_arm in scores.items()}
    dev = {arm: _mean(of_arm, (2, 3)) for arm, of_arm in scores.items()}
    if len(judges) == 1:
        return {arm: dev[arm][0] for arm in arms}
    together = np.concatenate([dev[arm] for arm in arms], axis=1)
    centre, spread = np.nanmean(together, axis=1), np.nanstd(together, axis=1)
    return {arm: np.mean((dev[arm].T - centre) / np.where(spread > 0, spread, 1.0), axis=1) for arm in arms}


def within_limit(dev: ArmScores, rank: Floats, kl_limit: float | None) -> Floats:
    """The ranks, with -inf for points that cannot be chosen. Raises DataError where none can be."""
    select = np.where(np.isnan(rank), -np.inf, rank)
    if kl_limit is not None:
        select = np.where(dev.kl.mean(axis=1) <= kl_limit, select, -np.inf)
    if not np.isfinite(select).any():
        if kl_limit is None or not np.isfinite(dev.kl).any():
            what = f"no setting of arm {dev.arm} has dev rows"
            raise DataError(what, where="selection on dev", fix="add dev rows")
        lowest = float(np.nanmin(dev.kl.mean(axis=1)))
        within = f"a KL of at most {kl_limit:g} nats on dev prompts: the lowest is {lowest:.3g}"
        what = f"no policy of arm {dev.arm} has {within}"
        raise DataError(what, where="the KL limit", fix="raise it, or train for smaller KLs")
    return np.asarray(select)


def candidates(
    data: StudyData, arms: Sequence[str], dev_prompts: NDArray[np.bool_], rule: Rule
) -> dict[str, Candidates]:
    """The points of the arms, ranked on the dev prompts that they share.

    Raises:
        DataError: no point of an arm is within the KL limit, or the chosen one has no test rows.
    """
    ranked = ranks(data, arms, dev_prompts, rule.judges)
    out = {}
    for arm in arms:
        of_dev, of_test = data.arms[arm]["dev"], data.arms[arm]["test"]
        select = within_limit(of_dev, ranked[arm], rule.kl_limit)
        tested = of_test.measured
        diverged_P = (of_dev.diverged | of_test.diverged).any(axis=1)
        on_frontier = np.isfinite(ranked[arm]) & tested & ~diverged_P
        out[arm] = Candidates(of_dev, of_test, ranked[arm], select, on_frontier)
        setting, checkpoint = of_dev.points[out[arm].chosen]
        if not bool(tested[out[arm].chosen]):
            what = f"setting {setting} at checkpoint {checkpoint} is chosen for arm {arm}, and has no test rows"
            raise DataError(what, where="selection on dev", fix="evaluate the chosen policies of every seed on test")
    return out


def coverage(data: StudyData, arms: Sequence[str], split: str, judges: Sequence[int]) -> Floats:
    """For each prompt of a split, the share of the arms' measured policies that all these judges say something of."""
    known = []
    for arm in arms:
        scores = data.arms[arm][split]
        known.append(np.isfinite(scores.scores[list(judges)][:, scores.measured]).all(axis=0))
    policies = np.concatenate([of_arm.reshape(-1, data.n_prompts[split]) for of_arm in known])
    return np.asarray(policies.mean(axis=0)) if len(policies) else np.ones(data.n_prompts[split])


def shared_prompts(data: StudyData, arms: Sequence[str], split: str, judges: Sequence[int]) -> NDArray[np.bool_]:
    """The prompts over which policies have means: those that all measured policies have.

    Where these are fewer than ``MIN_COVERAGE`` of the split, because a judge failed here and there, the prompts that so
    many of the policies have.

    Raises:
        DataError: there are none.
    """
    share_N = coverage(data, arms, split, judges)
    common = np.asarray(share_N == 1.0)
    if common.mean() >= MIN_COVERAGE:
        return common
    most = np.asarray(share_N >= MIN_COVERAGE)
    if not most.any():
        what = f"no {split} prompt has rows of {MIN_COVERAGE:.0%} of the settings, checkpoints and seeds"
        raise DataError(what, where="the study's table", fix="evaluate all policies of a split on the same prompts")
    return most


def point_facts(arm: ArmScores, point: int) -> dict[str, Any]:
    """Where a point lies: setting, checkpoint, KL and cost, means over the seeds that did not diverge."""
    setting, checkpoint = arm.points[point]
    facts = {"kl_nats": arm.kl, "train_tokens": arm.tokens, "wall_s": arm.seconds}
    return {"setting": setting, "checkpoint": checkpoint, **{k: mean_or_none(v[point]) for k, v in facts.items()}}


def mean_or_none(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
