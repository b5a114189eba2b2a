"""Make the shipped data ``arithmetic``: comparisons of solutions of small sums, and a label for each of their steps.

Both files have the same prompts and the same solutions, so that a run compares what comparisons teach with what step
labels teach. Equal seeds give equal bytes: ``python scripts/build_arithmetic.py --seed 0``.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toolkit.files import write_bytes
from toolkit.preferences.arithmetic import (
    LARGEST,
    SEPARATOR,
    check_steps,
    new_problem,
    progress,
    solve,
    solve_with_errors,
)
from toolkit.preferences.rows import Comparison, PreferenceRow, prompt_id, write_native

ASSETS = Path(__file__).resolve().parent.parent / "toolkit" / "preferences" / "assets"
N_WRONG = 2  # solutions of a prompt that have a wrong step


def wrong_solution(problem: str, rng: random.Random) -> list[str]:
    """Steps of which at least one is wrong: its result is off, and the steps behind it go on from there."""
    n = len(solve(problem))
    while True:
        errors = [rng.choice((-2, -1, 1, 2)) if rng.random() < 0.4 else 0 for _ in range(n)]
        steps = solve_with_errors(problem, errors)
        if any(errors) and all(0 <= int(step.split("=")[1]) <= LARGEST for step in steps):
            return steps


def solutions_of(problem: str, rng: random.Random) -> list[list[str]]:
    """One right solution and ``N_WRONG`` others, all different, in random order."""
    solutions = [solve(problem)]
    while len(solutions) <= N_WRONG:
        if (steps := wrong_solution(problem, rng)) not in solutions:
            solutions.append(steps)
    rng.shuffle(solutions)
    return solutions


def preference_row(problem: str, solutions: list[list[str]]) -> PreferenceRow:
    """The solution that gets further before its first wrong step is preferred."""
    texts = [SEPARATOR.join(steps) for steps in solutions]
    score = progress([problem] * len(texts), texts)
    comparisons = [
        Comparison(i, j) if score[i] > score[j] else Comparison(j, i)
        for i, j in combinations(range(len(texts)), 2)
        if score[i] != score[j]
    ]
    return PreferenceRow(prompt_id(problem), problem, texts, comparisons)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=2400)
    parser.add_argument("--out", type=Path, default=ASSETS)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    problems = dict[str, list[list[str]]]()
    while len(problems) < arguments.prompts:
        problem = new_problem(rng)
        if problem not in problems:
            problems[problem] = solutions_of(problem, rng)
    write_native((preference_row(*item) for item in problems.items()), arguments.out / "arithmetic.jsonl.gz")
    raw = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        for problem, solutions in problems.items():
            for steps in solutions:
                row = {"prompt": problem, "completions": steps, "labels": check_steps(problem, steps)}
                file.write(json.dumps(row).encode() + b"\n")
    (arguments.out / "steps").mkdir(parents=True, exist_ok=True)
    write_bytes(arguments.out / "steps" / "arithmetic.jsonl.gz", raw.getvalue())


if __name__ == "__main__":
    main()
