"""Both arms on the same test prompts: their chosen policies, and their frontiers where KL or cost are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.evals.intervals import Floats
from toolkit.evals.study.comparing import mixed_wins, score_row, win_row, wins_along
from toolkit.evals.study.crossed import CrossedMean, crossed_means
from toolkit.evals.study.frontier import Grid, frontier, shared_grid, weights_along
from toolkit.evals.study.selection import Candidates
from toolkit.evals.verdict import ARMS, NAMES, SMALLEST_EFFECT, Decision, decide

Axis = Literal["kl_nats", "train_tokens", "wall_s"]
AXES: dict[Axis, str] = {"kl_nats": "KL", "train_tokens": "training tokens", "wall_s": "wall time"}
NO_PROMPT = "no test prompt has a judgement of all policies that it compares"


def amount(axis: Axis, value: float | None) -> str:
    """A KL, a number of tokens or a time in a few digits.

    >>> amount("kl_nats", 3.14159), amount("train_tokens", 1_234_567), amount("wall_s", 42.4), amount("wall_s", None)
    ('3.14 nats', '1.23M', '42 s', 'unknown')
    """
    if value is None:
        return "unknown"
    if axis == "kl_nats":
        return f"{value:.2f} nats"
    if axis == "wall_s":
        return f"{value:,.0f} s"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


@dataclass(frozen=True)
class Matched:
    """Both arms' frontiers over one axis: points, and weights for each seed along a grid; or why there is none."""

    axis: Axis
    grid: Grid | None
    reason: str | None
    points: tuple[NDArray[np.int64], NDArray[np.int64]] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    weights: tuple[Floats, Floats] = (np.zeros(0), np.zeros(0))
    positions: tuple[Floats, Floats] = (np.zeros((0, 0)), np.zeros((0, 0)))  # of these points, (seeds, points)

    def at(self, x_G: Floats) -> Matched:
        """The same frontiers at other points of the axis."""
        first, second = self.positions
        grid = Grid(x_G, np.ones(len(x_G)) / max(1, len(x_G)))
        return replace(self, grid=grid, weights=(weights_along(first, x_G), weights_along(second, x_G)))

    @property
    def ends(self) -> tuple[float | None, float | None]:
        return (None, None) if self.grid is None else (float(self.grid.x_G[0]), float(self.grid.x_G[-1]))


@dataclass(frozen=True)
class Comparing:
    """The two arms on test prompts, by one judge or by several together (``judges``, by number).

    Each comparison is on the prompts that these judges say something of for all of its policies. ``indirect`` are the
    judges that compare each policy with a third one.
    """

    arms: tuple[Candidates, Candidates]
    n_prompts: int
    judges: tuple[int, ...] = (0,)
    indirect: frozenset[int] = frozenset()
    smallest_effect: float = SMALLEST_EFFECT

    def both_scores(self, points: tuple[NDArray[np.int64], NDArray[np.int64]]) -> tuple[Floats, Floats]:
        """(judges, points, seeds, prompts) of each arm, on the prompts that have all of them."""
        first, second = (
            arm.test.scores[list(self.judges)][:, of_arm] for arm, of_arm in zip(self.arms, points, strict=True)
        )
        there = np.isfinite(first).all(axis=(0, 1, 2)) & np.isfinite(second).all(axis=(0, 1, 2))
        return first[..., there], second[..., there]

    @property
    def _indirect_J(self) -> NDArray[np.bool_]:
        return np.array([judge in self.indirect for judge in self.judges])

    def best(self) -> CrossedMean | None:
        """The win rate of the chosen policies. None where no prompt has both."""
        points = (np.array([self.arms[0].chosen]), np.array([self.arms[1].chosen]))
        first, second = self.both_scores(points)
        if not first.shape[-1]:
            return None
        whole = tuple(np.ones((1, scores.shape[2], 1)) for scores in (first, second))
        return mixed_wins(first, second, whole[0], whole[1], np.ones(1), self._indirect_J)

    def over(self, matched: Matched) -> CrossedMean | None:
        """The mean over the shared range."""
        if matched.grid is None:
            return None
        first, second = self.both_scores(matched.points)
        if not first.shape[-1]:
            return None
        return mixed_wins(first, second, *matched.weights, matched.grid.weight_G, self._indirect_J)

    def decision(self, mean: CrossedMean | None, lacking: str | None = None) -> Decision:
        """The finding of a comparison; ``lacking`` is why there is none."""
        if mean is None:
            return Decision("undecided", lacking or NO_PROMPT)
        low, high = mean.interval(bounds=(0.0, 1.0))
        decision = decide(
            win_rate=mean.value,
            ci_low=low,
            ci_high=high,
            p_value=mean.p_value(0.5),
            n_judged=mean.n_prompts,
            n_prompts=self.n_prompts,
            smallest_effect=self.smallest_effect,
        )
        if decision.reason == "there is no interval":
            return Decision("undecided", "an arm has one seed")
        if decision.finding == "no practical difference" and low is not None and high is not None:
            # If each unseen tie were a win, or each a loss.
            widest = max(0.5 - low, high - 0.5) + mean.unseen / 2.0
            if widest > self.smallest_effect + 1e-9:
                return Decision(
                    "undecided",
                    f"{mean.unseen:.1%} of the comparisons are ties that no judge saw: one that compares each arm "
                    "with a third policy says the same of both",
                )
        return Decision(decision.finding, decision.reason.replace("permutation test", "t test"))

    def curve(self, matched: Matched, at: Sequence[float] | None = None) -> list[dict[str, Any]]:
        """Win rate and mean scores at each point of the grid, with pointwise intervals.

        ``at`` names other points; those outside of the shared range are left out.
        """
        if matched.grid is None:
            return []
        x_G = matched.grid.x_G
        if at is not None:
            x_G = np.array([x for x in at if x_G[0] <= x <= x_G[-1]])
            matched = matched.at(x_G)
        if not len(x_G):
            return []
        both = self.both_scores(matched.points)
        if not both[0].shape[-1]:
            return []
        along = wins_along(*both, *matched.weights)
        rows: list[dict[str, Any]] = [{**win_row(mean), "scores": {}} for mean in along]
        for side, (arm, scores) in enumerate(zip(ARMS, both, strict=True)):
            if len(scores) > 1:
                continue  # the scores of several judges have no common scale
            scores_GKN = np.einsum("gkp,pkn->gkn", matched.weights[side], scores[0], optimize=True)
            for row, mean in zip(rows, crossed_means(scores_GKN), strict=True):
                row["scores"][arm] = score_row(mean)
        return [{matched.axis: float(x), **row} for x, row in zip(x_G, rows, strict=True)]


def match(arms: tuple[Candidates, Candidates], axis: Axis) -> Matched:
    """The frontiers of both arms over KL, training tokens or seconds, and the grid over the range that they share.

    Points where a seed diverged are on no frontier: they have no KL, and no tuner would choose them.
    """
    points, positions, ranges = [], [], []
    for arm, name in zip(arms, ARMS, strict=True):
        x_PK = {"kl_nats": arm.test.kl, "train_tokens": arm.test.tokens, "wall_s": arm.test.seconds}[axis]
        usable = np.flatnonzero(arm.on_frontier & np.isfinite(x_PK).all(axis=1))
        if not len(usable):
            reason = f"no policy of {NAMES[name]} has dev and test rows of all seeds without a seed that diverged"
            return Matched(axis, None, reason)
        x_P = (arm.dev.kl if axis == "kl_nats" else x_PK)[usable].mean(axis=1)
        rank_P = arm.rank[usable]
        hull = usable[frontier(x_P, rank_P, until_peak=axis != "kl_nats")]
        points.append(hull)
        positions.append(x_PK[hull].T)
        ranges.append(x_PK[usable].T)
    grid = shared_grid(ranges[0], ranges[1])
    if grid is None:
        spans = "; ".join(
            f"{NAMES[name]} {amount(axis, x.min(axis=1).max())} to {amount(axis, x.max(axis=1).min())}"
            for name, x in zip(ARMS, ranges, strict=True)
        )
        return Matched(axis, None, f"the arms share no range of {AXES[axis]} ({spans})")
    first, second = positions
    weights = (weights_along(first, grid.x_G), weights_along(second, grid.x_G))
    return Matched(axis, grid, None, (points[0], points[1]), weights, (first, second))
