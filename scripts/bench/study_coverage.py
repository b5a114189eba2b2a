"""Simulates studies whose arms are known: coverage of the intervals, false winners, power, and the numbers planned.

usage: OMP_NUM_THREADS=1 python scripts/bench/study_coverage.py [--studies 2500] [--workers 1] [--out FILE]
       python scripts/bench/study_coverage.py --draw docs/images/study-power.svg

Studies come from study_simulation.py and pass through the same selection on dev prompts as a real one. The target
of an interval is the true win rate of the policies that were chosen, or of the frontiers that were reached, over new
seeds and new prompts. ``--draw`` makes the picture of the power curves from recorded results.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import harness
import numpy as np
import power_chart
from study_simulation import CURVES, Design, Truth, simulated, truth_of, two_policies

from toolkit.evals.best_of_n import best_of_n_weights
from toolkit.evals.study.comparing import win_shares, wins_along
from toolkit.evals.study.controls import gap_rows
from toolkit.evals.study.crossed import CrossedMean, VarianceParts, crossed_means
from toolkit.evals.study.frontier import Grid
from toolkit.evals.study.matching import Comparing, Matched, match
from toolkit.evals.study.needed import MOST_PROMPTS, MOST_SEEDS, needed, smallest
from toolkit.evals.study.selection import Candidates, Rule, candidates, shared_prompts
from toolkit.evals.study.study import study
from toolkit.evals.study.table import StudyData
from toolkit.evals.study.verdict import Means, three_means, winner_of
from toolkit.evals.verdict import ARMS, Decision, decide

# The three of the verdict, one point of the curve over KL, and the win rate at 4 trials each.
INTERVALS = ("best", "matched_kl", "matched_compute", "curve", "effort")
Interval = tuple[CrossedMean, float]  # a mean beside the truth


# ---------------------------------------------------------------- one study


@dataclass(frozen=True)
class Verdict:
    """One simulated study, as far as its verdict."""

    data: StudyData
    by_arm: dict[str, Candidates]
    compared: Comparing
    kl: Matched
    compute: Matched
    means: Means
    decisions: dict[str, Decision]

    @property
    def winner(self) -> str:
        return winner_of(self.means, self.decisions, {"score": self.means})[0]


def verdict_of(design: Design, rng: np.random.Generator) -> Verdict:
    data = simulated(design, rng)
    dev_prompts = shared_prompts(data, list(data.arms), "dev", data.deciding)
    by_arm = candidates(data, list(data.arms), dev_prompts, Rule(data.deciding))
    compared = Comparing((by_arm[ARMS[0]], by_arm[ARMS[1]]), design.prompts)
    kl, compute = (match(compared.arms, axis) for axis in ("kl_nats", "train_tokens"))
    means = three_means(compared, {"kl_nats": kl, "train_tokens": compute})
    decisions = {name: compared.decision(mean) for name, mean in means.items()}
    return Verdict(data, by_arm, compared, kl, compute, means, decisions)


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


def true_best(of: Verdict, truth: Truth) -> float:
    return truth.between(ARMS[0], of.by_arm[ARMS[0]].chosen, ARMS[1], of.by_arm[ARMS[1]].chosen)


def intervals(of: Verdict, truth: Truth) -> dict[str, Interval]:
    middle, four = middle_of_curve(of.compared, of.kl), best_of_four(of.compared)
    best, at_kl, at_compute = of.means.values()
    assert best is not None and at_kl is not None and at_compute is not None
    return {
        "best": (best, true_best(of, truth)),
        "matched_kl": (at_kl, truth.along(of.kl)),
        "matched_compute": (at_compute, truth.along(of.compute)),
        "curve": (middle[0], truth.along(middle[1])),
        "effort": (four[0], truth.along(four[1])),
    }


def gap_of(of: Verdict, truth: Truth) -> dict[str, tuple[dict[str, Any], float]]:
    """Each step's row of the gap, beside the true difference."""
    out = {}
    chosen = {arm: candidate.chosen for arm, candidate in of.by_arm.items()}
    over_dpo = {
        arm: 0.5 if arm == ARMS[1] else truth.between(arm, point, ARMS[1], chosen[ARMS[1]])
        for arm, point in chosen.items()
    }
    score = {arm: float(truth.reward[arm][point].mean()) for arm, point in chosen.items()}
    for row in gap_rows(of.data, of.by_arm):
        measure = over_dpo if row["measure"] == "win_rate" else score
        out[f"{row['from']} to {row['to']}, {row['measure']}"] = (row, measure[row["to"]] - measure[row["from"]])
    return out


# ---------------------------------------------------------------- many studies


def generator(design: Design, seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, *map(ord, json.dumps(asdict(design)))])


def share(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def described(design: Design) -> dict[str, Any]:
    """The design, without the fields that are as usual."""
    usual = asdict(Design(0, 0, 0.0))
    always = ("seeds", "prompts", "seed_sd", "curves", "gap")
    return {name: value for name, value in asdict(design).items() if name in always or value != usual[name]}


def summary(design: Design, n_studies: int, seed: int = 0) -> dict[str, Any]:
    """Coverage, bias and width of the intervals, and how often each arm wins."""
    rng = generator(design, seed)
    rows: dict[str, list[tuple[float, float, float]]] = {}
    outcomes = []
    for _ in range(n_studies):
        one, truth = verdict_of(design, rng), truth_of(design, rng)
        outcomes.append(outcome(one))
        bounded = [
            (name, mean.value, *mean.interval(bounds=(0.0, 1.0)), true)
            for name, (mean, true) in intervals(one, truth).items()
        ]
        steps = gap_of(one, truth).items() if design.controls else ()
        bounded += [(name, row["difference"], row["ci_low"], row["ci_high"], true) for name, (row, true) in steps]
        for name, value, low, high, true in bounded:
            assert low is not None and high is not None
            rows.setdefault(name, []).append((low <= true <= high, value - true, high - low))
    out = described(design)
    for name, of_interval in rows.items():
        measures = zip(("coverage", "bias", "width"), zip(*of_interval, strict=True), strict=True)
        out[name] = {measure: share(values) for measure, values in measures}
    return out | shares(outcomes)


def power(design: Design, n_studies: int) -> dict[str, Any]:
    """How often each arm wins, and the true win rate of best against best."""
    rng, truth = generator(design), truth_of(design, np.random.default_rng(0))
    studies = (verdict_of(design, rng) for _ in range(n_studies))
    outcomes, true = zip(*((outcome(one), true_best(one, truth)) for one in studies), strict=True)
    return described(design) | {"true_win_rate": share(true)} | shares(outcomes)


def outcome(of: Verdict) -> tuple[str, bool]:
    """The winner, and whether best against best alone finds an arm better."""
    return of.winner, of.decisions["best"].finding == "better"


def shares(outcomes: Sequence[tuple[str, bool]]) -> dict[str, float]:
    by_winner = {name: share([winner == name for winner, _ in outcomes]) for name in (*ARMS, "undecided")}
    return by_winner | {"best_alone": share([alone for _, alone in outcomes])}


# ---------------------------------------------------------------- the numbers that a study plans


def compared_alone(design: Design, n_seeds: int, n_prompts: int, rng: np.random.Generator) -> CrossedMean:
    """Best against best of two policies that are known."""
    first, second = two_policies(design, n_seeds, n_prompts, rng)
    wins_KLN = win_shares(first[None, None], second[None, None])[0, 0]
    return crossed_means(wins_KLN.mean(axis=1)[None], wins_KLN.mean(axis=0)[None])[0]


def decision_of(mean: CrossedMean) -> Decision:
    low, high = mean.interval(bounds=(0.0, 1.0))
    n, p = mean.n_prompts, mean.p_value(0.5)
    return decide(win_rate=mean.value, ci_low=low, ci_high=high, p_value=p, n_judged=n, n_prompts=n)


def true_parts(design: Design, rng: np.random.Generator) -> CrossedMean:
    """The true win rate and the true variance parts: the means of many large studies."""
    large = [compared_alone(design, 40, 4000, rng) for _ in range(20)]
    parts = [mean.parts for mean in large if mean.parts is not None]
    mean_parts = VarianceParts(
        tuple(np.mean([p.seeds for p in parts], axis=0)),
        tuple(np.mean([p.interaction for p in parts], axis=0)),
        float(np.mean([p.by_prompt for p in parts])),
        parts[0].n_seeds,
    )
    return replace(large[0], value=float(np.mean([mean.value for mean in large])), parts=mean_parts)


MOST_SIMULATED = 50_000  # responses of one policy; plans beyond are counted as such


def planned(design: Design, n_studies: int) -> dict[str, Any]:
    """Whether 80% of studies are decided at the numbers that ``verdict.needed`` names.

    ``from_truth``: planned from the true win rate and variances. ``from_studies``: planned by each undecided study from
    its own numbers, and one new study of that size.
    """
    rng = generator(design)
    true = true_parts(design, rng)
    k, n = design.seeds, design.prompts

    def decided(n_seeds: int, n_prompts: int) -> bool:
        mean = compared_alone(design, n_seeds, n_prompts, rng)
        return decision_of(mean).finding == "better" and mean.value > 0.5

    sizes: dict[str, Callable[[int], tuple[int, int]]] = {"prompts": lambda m: (k, m), "seeds": lambda m: (m, n)}
    out = described(design) | {"true_win_rate": round(true.value, 4)}
    pilots = [compared_alone(design, k, n, rng) for _ in range(n_studies)]
    rows = [needed(pilot, decision_of(pilot)) for pilot in pilots]
    undecided = [row for row in rows if row["finding"] == "undecided"]
    out["undecided"] = share([row["finding"] == "undecided" for row in rows])
    for name, size in sizes.items():
        most = MOST_PROMPTS if name == "prompts" else MOST_SEEDS

        def power_at(m: int, size: Callable[[int], tuple[int, int]] = size) -> float:
            seeds, prompts = size(m)
            return true.power(0.5, (seeds, seeds), prompts)

        planned_once = smallest(power_at, 2, most)
        numbers = [row[f"n_{name}"] for row in undecided if row[f"n_{name}"] is not None]
        tried = [m for m in numbers if np.prod(size(m)) <= MOST_SIMULATED]
        out[f"more_{name}"] = {
            "from_truth": planned_once,
            "decided_from_truth": None
            if planned_once is None or np.prod(size(planned_once)) > MOST_SIMULATED
            else share([decided(*size(planned_once)) for _ in range(n_studies)]),
            "studies_with_a_number": round(len(numbers) / max(1, len(undecided)), 4),
            "median": float(np.median(numbers)) if numbers else None,
            "tried": len(tried),
            "decided_from_studies": share([decided(*size(m)) for m in tried]) if tried else None,
        }
    return out


# ---------------------------------------------------------------- all designs


SIZES = [(seeds, prompts) for seeds in (3, 5) for prompts in (100, 300)]
MIDDLE = [Design(3, 300, 0.1, "crossing"), Design(5, 100, 0.1, "apart")]
GAPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4)
PLANNED = [Design(3, 100, 0.05, gap=0.2), Design(3, 100, 0.1, gap=0.3), Design(5, 100, 0.1, gap=0.3)]
PLANNED += [Design(3, 300, 0.3, gap=0.5), Design(5, 300, 0.3, gap=0.5)]
SHARE = 0.2  # of the studies in each design of the other groups; those of "coverage" are the promise
# Name -> what is measured, and the designs. In "coverage", 3 or 5 seeds of both arms, normal effects, and scores.
GROUPS: dict[str, tuple[Callable[[Design, int], dict[str, Any]], list[Design]]] = {
    "coverage": (
        summary,
        [Design(*size, seed_sd, curves) for size in SIZES for seed_sd in (0.0, 0.1, 0.3) for curves in CURVES],
    ),
    "two_seeds": (
        summary,
        [Design(2, 300, seed_sd, curves) for seed_sd in (0.0, 0.1, 0.3) for curves in ("equal", "crossing")],
    ),
    "unequal_seeds": (
        summary,
        [Design(3, 300, seed_sd, curves, dpo_seeds=5) for seed_sd in (0.1, 0.3) for curves in CURVES],
    ),
    "preferences": (summary, [replace(design, values="preference") for design in (Design(3, 100, 0.1), *MIDDLE)]),
    "controls": (summary, [replace(design, controls=True) for design in (*MIDDLE, Design(3, 300, 0.3, "apart"))]),
    "shared_seeds": (
        summary,
        [Design(seeds, 300, seed_sd, "crossing", shared_seeds=True) for seeds in (3, 5) for seed_sd in (0.1, 0.3)],
    ),
    "heavy_tails": (
        summary,
        [
            Design(seeds, 300, sd, curves, tails="t3")
            for seeds in (3, 5)
            for sd in (0.1, 0.3)
            for curves in ("equal", "crossing")
        ],
    ),
    "power": (power, [Design(*size, sd, gap=gap) for sd in (0.1, 0.3) for size in SIZES for gap in GAPS]),
    "needed": (planned, PLANNED),
}


def measured(task: tuple[str, Design, int]) -> dict[str, Any]:
    """One design's row. It depends on the design and the number of studies alone."""
    group, design, n_studies = task
    return GROUPS[group][0](design, n_studies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2500)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "study_coverage.json")
    parser.add_argument("--day", default=date.today().isoformat())
    parser.add_argument(
        "--only", nargs="*", choices=GROUPS, default=list(GROUPS), help="measure these groups; the others stay"
    )
    parser.add_argument("--draw", type=Path, help="draw the recorded power curves into this SVG file")
    options = parser.parse_args()
    if options.draw:
        options.draw.write_text(power_chart.svg(json.loads(options.out.read_text())["power"]), encoding="utf-8")
        return
    studies = {name: options.studies if name == "coverage" else round(SHARE * options.studies) for name in options.only}
    tasks = [(name, design, studies[name]) for name in options.only for design in GROUPS[name][1]]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    with Pool(options.workers) as pool:
        for (name, _, _), row in zip(tasks, pool.imap(measured, tasks), strict=True):
            print(json.dumps({"group": name, **row}), flush=True)
            results[name].append(row)
    before = json.loads(options.out.read_text()) if set(options.only) != set(GROUPS) and options.out.exists() else {}
    record = {
        "command": f"OMP_NUM_THREADS=1 python scripts/bench/study_coverage.py --studies {options.studies}",
        "date": options.day,
        "studies": before.get("studies", {}) | studies,
        "verdict_s": document_seconds(),
        "load_average": round(os.getloadavg()[0], 1),
        **{name: results.get(name, before.get(name)) for name in GROUPS},
    }
    harness.write(options.out, record)


def document_seconds() -> float:
    """CPU time of the whole document of a study with 3 seeds, 8 settings, 4 checkpoints and 300 prompts."""
    data = simulated(Design(3, 300, 0.1, "apart"), np.random.default_rng(0))
    study(data)
    started = time.process_time()
    study(data)
    return round(time.process_time() - started, 3)


if __name__ == "__main__":
    main()
