"""Simulates studies whose arms are known: coverage of the intervals, false winners, power.

usage: OMP_NUM_THREADS=1 python scripts/bench/study_coverage.py [--studies 1000] [--out FILE]

A simulated score is ``f(KL) + setting + seed + run + prompt + noise``. The seed's part is shared by an arm's settings,
the run's part belongs to one setting and seed. Both arms have 8 settings with 4 checkpoints, and pass through the same
selection on dev prompts as a real study. The target of an interval is the true win rate of the
policies that were chosen, or of the frontiers that were reached, over new seeds and new prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import harness
import numpy as np
from scipy.stats import norm

from toolkit.evals.study.comparing import wins_along
from toolkit.evals.study.crossed import CrossedMean
from toolkit.evals.study.effort import best_of_n_weights
from toolkit.evals.study.frontier import Grid, weights_along
from toolkit.evals.study.matching import Comparing, Matched, match
from toolkit.evals.study.selection import Candidates, Rule, candidates, common_prompts
from toolkit.evals.study.study import study
from toolkit.evals.study.table import ArmScores, StudyData
from toolkit.evals.study.verdict import three_means, winner_of
from toolkit.evals.verdict import ARMS

N_SETTINGS, N_CHECKPOINTS = 8, 4
NOISE, PROMPT_BY_ARM = 1.0, 0.5
KL_SPREAD = 0.05
# Reward over sqrt(KL): slope and curvature of both arms.
CURVES = {
    "equal": ((0.6, -0.1), (0.6, -0.1)),
    "crossing": ((0.9, -0.2), (0.5, -0.05)),
    "apart": ((0.7, -0.1), (0.5, -0.1)),
}
# How far an arm's settings lie apart: DPO is easier to tune. Equal arms are equal in this too.
SPREADS = {"equal": (0.8, 0.8), "crossing": (0.8, 0.3), "apart": (0.8, 0.3)}


@dataclass(frozen=True)
class Design:
    seeds: int
    prompts: int
    seed_sd: float  # of the noise of one response
    curves: str = "equal"
    gap: float = 0.0  # added to every score of RM + PPO


def reward(design: Design, side: int, kl_PK: np.ndarray) -> np.ndarray:
    """The expected score (points, seeds) of policies at a KL."""
    slope, curvature = CURVES[design.curves][side]
    d = np.sqrt(kl_PK)
    setting = np.repeat(np.linspace(-SPREADS[design.curves][side], 0.0, N_SETTINGS), N_CHECKPOINTS)
    return setting[:, None] + slope * d + curvature * d**2 + design.gap * (side == 0)


def true_kl(side: int) -> np.ndarray:
    """The KL (points,) that each setting reaches at each checkpoint: 0.5 to 9 nats, DPO up to 12."""
    last = np.linspace(5.0, 9.0 + 3.0 * side, N_SETTINGS)
    return (last[:, None] * (np.arange(1, N_CHECKPOINTS + 1) / N_CHECKPOINTS) ** 1.5).ravel()


def simulated(design: Design, rng: np.random.Generator) -> StudyData:
    """One study."""
    n_points, k, n = N_SETTINGS * N_CHECKPOINTS, design.seeds, design.prompts
    prompt_N = rng.normal(size=2 * n)
    arms = {}
    for side, arm in enumerate(ARMS):
        kl_PK = true_kl(side)[:, None] * np.exp(KL_SPREAD * rng.normal(size=(n_points, k)))
        each = design.seed_sd / np.sqrt(2)
        run = np.repeat(each * rng.normal(size=(N_SETTINGS, k)), N_CHECKPOINTS, axis=0)
        mean_PK = reward(design, side, kl_PK) + each * rng.normal(size=k) + run
        on_prompt_N = prompt_N + PROMPT_BY_ARM * rng.normal(size=2 * n)
        scores = mean_PK[:, :, None] + on_prompt_N + NOISE * rng.normal(size=(n_points, k, 2 * n))
        points = tuple((f"s{t}", c) for t in range(N_SETTINGS) for c in range(N_CHECKPOINTS))
        tokens = np.tile(np.arange(1.0, N_CHECKPOINTS + 1), N_SETTINGS)[:, None] * np.full(k, 2.5e5)
        whole = np.zeros((n_points, k), dtype=bool)
        halves = {"dev": scores[None, ..., :n], "test": scores[None, ..., n:]}
        arms[arm] = {
            split: ArmScores(arm, points, tuple(range(k)), half, whole, kl_PK, tokens, tokens / 1e4)
            for split, half in halves.items()
        }
    return StudyData(("score",), arms, {"dev": n, "test": n})


N_NEW_SEEDS = 64
# The three of the verdict, one point of the curve over KL, and the win rate at 4 trials each.
INTERVALS = ("best", "matched_kl", "matched_compute", "curve", "effort")


def target(design: Design, points: tuple[np.ndarray, np.ndarray], matched: Matched | None, new: np.ndarray) -> float:
    """The true win rate of what was chosen, over new seeds and prompts. ``new`` (2, points, seeds) are standard normal.

    The score of a policy is normal given its KL, so that a win has a probability in closed form; the mean over what KL
    new seeds reach is over ``N_NEW_SEEDS`` of them.
    """
    spread = np.sqrt(2 * (NOISE**2 + PROMPT_BY_ARM**2 + design.seed_sd**2))
    kl = [true_kl(side)[points[side], None] * np.exp(KL_SPREAD * new[side][points[side]]) for side in range(2)]
    rewards = []
    for side in range(2):
        every = np.repeat(true_kl(side)[:, None], N_NEW_SEEDS, axis=1)
        every[points[side]] = kl[side]
        rewards.append(reward(design, side, every)[points[side]])
    wins_PQM = norm.cdf((rewards[0][:, None] - rewards[1][None]) / spread)
    if matched is None:
        return float(wins_PQM.mean())
    assert matched.grid is not None
    if matched.axis == "kl_nats":
        weights = [weights_along(kl[side].T, matched.grid.x_G) for side in range(2)]
    else:
        weights = [np.repeat(matched.weights[side][:, :1], N_NEW_SEEDS, axis=1) for side in range(2)]
    return float(np.einsum("g,gmp,gmq,pqm->", matched.grid.weight_G, *weights, wins_PQM, optimize=True) / N_NEW_SEEDS)


def middle_of_curve(compared: Comparing, matched: Matched) -> tuple[CrossedMean, Matched]:
    """The win rate at one KL, in the middle of the range."""
    assert matched.grid is not None
    at = slice(len(matched.grid.x_G) // 2, len(matched.grid.x_G) // 2 + 1)
    weights = (matched.weights[0][at], matched.weights[1][at])
    point = replace(matched, grid=Grid(matched.grid.x_G[at], np.ones(1)), weights=weights)
    return wins_along(*compared.both_scores(point.points), *weights)[0], point


def best_of_four(compared: Comparing) -> tuple[CrossedMean, Matched]:
    """The win rate at 4 trials each, as a mixture of the trials."""
    points = (compared.arms[0].best_of_trials, compared.arms[1].best_of_trials)
    weights = [
        np.repeat(best_of_n_weights(arm.select[best])[3:4, None], len(arm.test.seeds), axis=1)
        for arm, best in zip(compared.arms, points, strict=True)
    ]
    mixed = Matched("train_tokens", Grid(np.ones(1), np.ones(1)), None, points, (weights[0], weights[1]))
    return wins_along(*compared.both_scores(points), *mixed.weights)[0], mixed


def one_study(design: Design, rng: np.random.Generator) -> dict[str, Any]:
    """What one study finds, and whether its intervals hold the truth."""
    data = simulated(design, rng)
    prompts = common_prompts(data, ARMS)
    by_arm = candidates(data, ARMS, prompts, Rule(data.deciding))
    arms: tuple[Candidates, Candidates] = (by_arm[ARMS[0]], by_arm[ARMS[1]])
    compared = Comparing(arms, prompts["test"], design.prompts)
    on = {axis: match(arms, axis) for axis in ("kl_nats", "train_tokens")}
    means = three_means(compared, on)
    new = rng.normal(size=(2, N_SETTINGS * N_CHECKPOINTS, N_NEW_SEEDS))
    places = {
        "best": ((np.array([arms[0].chosen]), np.array([arms[1].chosen])), None),
        "matched_kl": (on["kl_nats"].points, on["kl_nats"]),
        "matched_compute": (on["train_tokens"].points, on["train_tokens"]),
    }
    decisions = {name: compared.decision(mean) for name, mean in means.items()}
    result: dict[str, Any] = {"winner": winner_of(means, decisions, {"score": means})[0]}
    result["best_alone"] = decisions["best"].finding == "better"
    middle, four = middle_of_curve(compared, on["kl_nats"]), best_of_four(compared)
    more = {"curve": (middle[1].points, middle[1]), "effort": (four[1].points, four[1])}
    for name, mean in {**means, "curve": middle[0], "effort": four[0]}.items():
        truth = target(design, *{**places, **more}[name], new)
        low, high = mean.interval(bounds=(0.0, 1.0))
        result[name] = {"covers": low <= truth <= high, "error": mean.value - truth, "width": high - low}
    return result


def summary(design: Design, n_studies: int, seed: int = 0) -> dict[str, Any]:
    """Coverage, bias and width of the intervals, and how often each arm wins."""
    rng = np.random.default_rng([seed, *map(ord, json.dumps(asdict(design)))])
    rows = [one_study(design, rng) for _ in range(n_studies)]
    out: dict[str, Any] = asdict(design)
    for name in INTERVALS:
        parts = [row[name] for row in rows]
        out[name] = {
            "coverage": round(float(np.mean([part["covers"] for part in parts])), 4),
            "bias": round(float(np.mean([part["error"] for part in parts])), 4),
            "width": round(float(np.mean([part["width"] for part in parts])), 4),
        }
    for winner in (*ARMS, "undecided"):
        out[winner] = round(float(np.mean([row["winner"] == winner for row in rows])), 4)
    out["best_alone"] = round(float(np.mean([row["best_alone"] for row in rows])), 4)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "study_coverage.json")
    parser.add_argument("--day", default=date.today().isoformat())
    options = parser.parse_args()
    started = time.process_time()
    sizes = [(seeds, prompts) for seeds in (3, 5) for prompts in (100, 300)]
    designs = [Design(*size, seed_sd, curves) for size in sizes for seed_sd in (0.0, 0.1, 0.3) for curves in CURVES]
    designs += [Design(2, 300, seed_sd, "equal") for seed_sd in (0.0, 0.1, 0.3)]
    power = [Design(seeds, 300, 0.1, "equal", gap) for seeds in (3, 5) for gap in (0.1, 0.2, 0.3, 0.5)]
    results = {}
    for name, group in (("coverage", designs), ("power", power)):
        results[name] = [summary(design, options.studies) for design in group]
        for row in results[name]:
            print(json.dumps(row), flush=True)
    first = one_study_seconds()
    measured = {
        "command": f"OMP_NUM_THREADS=1 python scripts/bench/study_coverage.py --studies {options.studies}",
        "date": options.day,
        "studies": options.studies,
        "cpu_s": round(time.process_time() - started),
        "verdict_s": first,
        "load_average": round(os.getloadavg()[0], 1),
        **results,
    }
    harness.write(options.out, measured)


def one_study_seconds() -> float:
    """CPU time of the whole document of a study with 3 seeds, 8 settings, 4 checkpoints and 300 prompts."""
    data = simulated(Design(3, 300, 0.1, "apart"), np.random.default_rng(0))
    study(data)
    started = time.process_time()
    study(data)
    return round(time.process_time() - started, 3)


if __name__ == "__main__":
    main()
