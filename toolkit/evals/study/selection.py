"""Which setting and checkpoint of an arm is chosen: by one rule, the highest mean score on dev prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats
from toolkit.evals.study.table import ArmScores, StudyData


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
        names = np.array([setting for setting, _ in self.dev.points])
        return [(str(name), np.flatnonzero(names == name)) for name in dict.fromkeys(names)]

    @property
    def best_of_trials(self) -> NDArray[np.int64]:
        """The point of each trial that is best on dev."""
        return np.array([points[np.argmax(self.select[points])] for _, points in self.trials])


def means(scores: ArmScores, prompts: NDArray[np.bool_]) -> Floats:
    """Mean score (judges, points) over seeds and prompts; NaN where there are no rows."""
    return np.asarray(scores.on(prompts).mean(axis=(2, 3)))


def candidates(
    data: StudyData, arms: Sequence[str], prompts: Mapping[str, NDArray[np.bool_]], kl_limit: float | None
) -> dict[str, Candidates]:
    """The points of the arms, ranked on the dev prompts that both arms have.

    Judges that an arm was trained on have no say. With one judge a point is ranked by its mean score; with several by
    the mean of their standardised scores, where each judge's mean and spread are those of all points of these arms.

    Raises:
        DataError: no point of an arm is within the KL limit, or the chosen one has no test rows.
    """
    dev = {arm: means(data.arms[arm]["dev"], prompts["dev"])[list(data.deciding)] for arm in arms}
    ranks = {arm: dev[arm][0] for arm in arms}
    if len(data.deciding) > 1:
        together = np.concatenate([dev[arm] for arm in arms], axis=1)
        centre, spread = np.nanmean(together, axis=1), np.nanstd(together, axis=1)
        ranks = {arm: np.mean((dev[arm].T - centre) / np.where(spread > 0, spread, 1.0), axis=1) for arm in arms}
    out = {}
    for arm in arms:
        of_dev, of_test = data.arms[arm]["dev"], data.arms[arm]["test"]
        select = np.where(np.isnan(ranks[arm]), -np.inf, ranks[arm])
        if kl_limit is not None:
            kl_P = of_dev.kl.mean(axis=1)
            select = np.where(kl_P <= kl_limit, select, -np.inf)
        if not np.isfinite(select).any():
            at = "" if kl_limit is None else f" at a KL up to {kl_limit:g}"
            what = f"no setting of arm {arm} has dev rows{at}"
            raise DataError(what, where="selection on dev", fix="add dev rows, or raise the KL limit")
        tested = np.asarray(np.isfinite(means(of_test, prompts["test"])).all(axis=0))
        diverged_P = (of_dev.diverged | of_test.diverged).any(axis=1)
        on_frontier = np.isfinite(ranks[arm]) & tested & ~diverged_P
        out[arm] = Candidates(of_dev, of_test, ranks[arm], select, on_frontier)
        setting, checkpoint = of_dev.points[out[arm].chosen]
        if not bool(tested[out[arm].chosen]):
            what = f"setting {setting} at checkpoint {checkpoint} is chosen for arm {arm}, and has no test rows"
            raise DataError(what, where="selection on dev", fix="evaluate the chosen policies of every seed on test")
    return out


def common_prompts(data: StudyData, arms: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """The prompts of each split that all measured points of the arms have rows of.

    Raises:
        DataError: there are none.
    """
    common = {}
    for split, n in data.n_prompts.items():
        there = np.ones(n, dtype=bool)
        for arm in arms:
            scores = data.arms[arm][split]
            there &= np.isfinite(scores.scores[:, scores.measured]).all(axis=(0, 1, 2))
        if not there.any():
            what = f"no {split} prompt has rows of every setting, checkpoint and seed"
            raise DataError(what, where="the study's table", fix="evaluate all policies of a split on the same prompts")
        common[split] = there
    return common


def point_facts(arm: ArmScores, point: int) -> dict[str, Any]:
    """Where a point lies: setting, checkpoint, KL and cost, means over the seeds that did not diverge."""
    setting, checkpoint = arm.points[point]
    facts = {"kl_nats": arm.kl, "train_tokens": arm.tokens, "wall_s": arm.seconds}
    return {"setting": setting, "checkpoint": checkpoint, **{k: mean_or_none(v[point]) for k, v in facts.items()}}


def mean_or_none(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
