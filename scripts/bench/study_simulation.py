"""Simulated studies whose truth is known: scores of policies, and the win rates that they have over new seeds.

A simulated score is ``f(KL) + setting + seed + run + prompt + noise``. The seed's part is shared by an arm's settings,
the run's part belongs to one setting and seed. Both arms have 8 settings with 4 checkpoints; a control has one setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import norm

from toolkit.evals.study.frontier import weights_along
from toolkit.evals.study.matching import Matched
from toolkit.evals.study.table import ArmScores, StudyData
from toolkit.evals.verdict import ARMS

N_SETTINGS, N_CHECKPOINTS = 8, 4
NOISE, PROMPT_BY_ARM = 1.0, 0.5
KL_SPREAD = 0.05
N_NEW_SEEDS = 24
TIE = 0.3  # a judge that compares with the baseline calls scores that are nearer than this a tie
Wins = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Design:
    """A kind of study.

    ``seed_sd`` is the spread of the seeds' effect, in units of the noise of one response. ``tails``: "normal", or "t3"
    for effects with Student's t distribution of 3 degrees of freedom and the same spread. ``values``: "score", or
    "preference" for 0, 1/2 or 1 against a baseline. With ``shared_seeds`` equal seeds of all arms share the seed's part
    (half of the variance), as where they start from one SFT policy.
    """

    seeds: int
    prompts: int
    seed_sd: float
    curves: str = "equal"
    gap: float = 0.0  # added to every score of RM + PPO
    dpo_seeds: int | None = None  # where they are not as many
    tails: str = "normal"
    values: str = "score"
    shared_seeds: bool = False
    controls: bool = False


@dataclass(frozen=True)
class Arm:
    """Reward over sqrt(KL) by ``slope`` and ``curvature``; settings lie up to ``spread`` below it, with equal steps."""

    slope: float
    curvature: float
    spread: float
    furthest: float  # the KL at which the last setting ends, in nats
    gap: float = 0.0
    n_settings: int = N_SETTINGS

    @property
    def kl(self) -> np.ndarray:
        """The KL (points,) that each setting reaches at each checkpoint: from 0.6 nats on."""
        last = np.linspace(5.0, self.furthest, self.n_settings)
        return (last[:, None] * (np.arange(1, N_CHECKPOINTS + 1) / N_CHECKPOINTS) ** 1.5).ravel()

    def reward(self, kl_PK: np.ndarray) -> np.ndarray:
        """The expected score (points, seeds) of policies at a KL."""
        d = np.sqrt(kl_PK)
        setting = np.repeat(np.linspace(-self.spread, 0.0, self.n_settings), N_CHECKPOINTS)
        return setting[:, None] + self.slope * d + self.curvature * d**2 + self.gap


# DPO is easier to tune: its settings lie less far apart. Equal arms are equal in this too.
CURVES = {
    "equal": (Arm(0.6, -0.1, 0.8, 9.0), Arm(0.6, -0.1, 0.8, 12.0)),
    "crossing": (Arm(0.9, -0.2, 0.8, 9.0), Arm(0.5, -0.05, 0.3, 12.0)),
    "apart": (Arm(0.7, -0.1, 0.8, 9.0), Arm(0.5, -0.1, 0.3, 12.0)),
}
CONTROLS = {"online_dpo": Arm(0.55, -0.1, 0.0, 9.0, n_settings=1), "rloo": Arm(0.65, -0.1, 0.0, 9.0, n_settings=1)}


def arms_of(design: Design) -> dict[str, Arm]:
    first, second = CURVES[design.curves]
    gap_first = Arm(first.slope, first.curvature, first.spread, first.furthest, design.gap)
    return dict(zip(ARMS, (gap_first, second), strict=True)) | (CONTROLS if design.controls else {})


def effects(design: Design, rng: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
    """Effects of seeds or runs, each with half of the seeds' variance."""
    each = design.seed_sd / np.sqrt(2)
    if design.tails == "t3":
        return each / np.sqrt(3) * rng.standard_t(3, size=shape)
    return each * rng.normal(size=shape)


def simulated(design: Design, rng: np.random.Generator) -> StudyData:
    """One study."""
    n = design.prompts
    prompt_N = rng.normal(size=2 * n)
    baseline_N = prompt_N + NOISE * rng.normal(size=2 * n)
    most_seeds = max(design.seeds, design.dpo_seeds or 0)
    shared_K = effects(design, rng, most_seeds)
    arms = {}
    for name, arm in arms_of(design).items():
        k = design.dpo_seeds or design.seeds if name == ARMS[1] else design.seeds
        kl_PK = arm.kl[:, None] * np.exp(KL_SPREAD * rng.normal(size=(len(arm.kl), k)))
        seed_K = shared_K[:k] if design.shared_seeds else effects(design, rng, k)
        run = np.repeat(effects(design, rng, (arm.n_settings, k)), N_CHECKPOINTS, axis=0)
        on_prompt_N = prompt_N + PROMPT_BY_ARM * rng.normal(size=2 * n)
        scores = (arm.reward(kl_PK) + seed_K + run)[:, :, None] + on_prompt_N
        scores += NOISE * rng.normal(size=scores.shape)
        if design.values == "preference":
            ahead = scores - baseline_N
            scores = np.where(np.abs(ahead) < TIE, 0.5, (ahead > 0).astype(float))
        points = tuple((f"s{t}", c) for t in range(arm.n_settings) for c in range(N_CHECKPOINTS))
        tokens = np.tile(np.arange(1.0, N_CHECKPOINTS + 1), arm.n_settings)[:, None] * np.full(k, 2.5e5)
        whole = np.zeros((len(arm.kl), k), dtype=bool)
        halves = {"dev": scores[None, ..., :n], "test": scores[None, ..., n:]}
        arms[name] = {
            split: ArmScores(name, points, tuple(range(k)), half, whole, kl_PK, tokens, tokens / 1e4)
            for split, half in halves.items()
        }
    return StudyData(("score",), arms, {"dev": n, "test": n})


# ---------------------------------------------------------------- the truth


def win_probability(design: Design) -> Wins:
    """The probability (P, Q, seeds) that a new response beats another, from their policies' expected scores."""
    if design.values == "preference":
        return lambda first_PM, second_QM: _by_preference(design, first_PM, second_QM)
    response = np.sqrt(2 * (NOISE**2 + PROMPT_BY_ARM**2))
    if design.tails == "normal":
        spread = np.hypot(response, np.sqrt(2) * design.seed_sd)
        return lambda first_PM, second_QM: norm.cdf((first_PM[:, None] - second_QM[None]) / spread)
    x, wins = _heavy_tails(design, float(response))
    return lambda first_PM, second_QM: np.interp(first_PM[:, None] - second_QM[None], x, wins)


@lru_cache
def _heavy_tails(design: Design, response: float) -> tuple[np.ndarray, np.ndarray]:
    """Win probability at differences of expected scores, over many draws of four effects with heavy tails."""
    draws = effects(design, np.random.default_rng(0), (4, 50_000)).sum(axis=0)
    x = np.linspace(-4.0, 4.0, 321)
    return x, np.array([0.5 * (norm.cdf((d + draws) / response) + norm.cdf((d - draws) / response)).mean() for d in x])


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)


def _by_preference(design: Design, first_PM: np.ndarray, second_QM: np.ndarray) -> np.ndarray:
    """As preferences over one baseline, whose own noise both policies meet."""
    spread = np.sqrt(NOISE**2 + PROMPT_BY_ARM**2 + design.seed_sd**2)
    total = 0.0
    for node, weight in zip(NOISE * _NODES, _WEIGHTS / _WEIGHTS.sum(), strict=True):
        worse, at_most_tie = (
            [norm.cdf((bound + node - of) / spread) for of in (first_PM, second_QM)] for bound in (-TIE, TIE)
        )
        first = (worse[0], at_most_tie[0] - worse[0], 1 - at_most_tie[0])
        second = (worse[1], at_most_tie[1] - worse[1], 1 - at_most_tie[1])
        for i, one in enumerate(first):
            for j, other in enumerate(second):
                share = 0.5 if i == j else float(i > j)
                total = total + weight * share * one[:, None] * other[None]
    return np.asarray(total)


@dataclass(frozen=True)
class Truth:
    """What new seeds and prompts would say of one study's policies. ``kl`` and ``reward`` have (points, new seeds)."""

    kl: Mapping[str, np.ndarray]
    reward: Mapping[str, np.ndarray]
    wins: Wins

    def between(self, first: str, point: int, second: str, other: int) -> float:
        """The win rate of one policy over another."""
        return float(self.wins(self.reward[first][[point]], self.reward[second][[other]]).mean())

    def along(self, matched: Matched) -> float:
        """The mean win rate over a range of KL or cost."""
        assert matched.grid is not None
        first, second = (self.reward[arm][points] for arm, points in zip(ARMS, matched.points, strict=True))
        if matched.axis == "kl_nats":
            reached = [self.kl[arm][points] for arm, points in zip(ARMS, matched.points, strict=True)]
            weights = [weights_along(kl.T, matched.grid.x_G) for kl in reached]
        else:
            weights = [np.repeat(of_arm[:, :1], N_NEW_SEEDS, axis=1) for of_arm in matched.weights]
        wins_PQM = self.wins(first, second)
        return float(
            np.einsum("g,gmp,gmq,pqm->", matched.grid.weight_G, *weights, wins_PQM, optimize=True) / N_NEW_SEEDS
        )


def truth_of(design: Design, rng: np.random.Generator) -> Truth:
    """The truth over ``N_NEW_SEEDS`` draws of what KL a new seed reaches; all else is exact, or nearly so."""
    kl, rewards = {}, {}
    for name, arm in arms_of(design).items():
        kl[name] = arm.kl[:, None] * np.exp(KL_SPREAD * rng.normal(size=(len(arm.kl), N_NEW_SEEDS)))
        rewards[name] = arm.reward(kl[name])
    return Truth(kl, rewards, win_probability(design))


# ---------------------------------------------------------------- two policies alone


def two_policies(
    design: Design, n_seeds: int, n_prompts: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (seeds, prompts) of one policy of each arm, whose expected scores differ by the design's gap."""
    prompt_N = rng.normal(size=n_prompts)
    sides = []
    for gap in (design.gap, 0.0):
        mean_K = gap + effects(design, rng, n_seeds) + effects(design, rng, n_seeds)
        on_prompt_N = prompt_N + PROMPT_BY_ARM * rng.normal(size=n_prompts)
        sides.append(mean_K[:, None] + on_prompt_N + NOISE * rng.normal(size=(n_seeds, n_prompts)))
    return sides[0], sides[1]
