"""The shipped sums: what their builder makes, small, and labelled as arithmetic says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.running import ROOT, environment

from toolkit.preferences.arithmetic import LARGEST, check_steps, progress
from toolkit.preferences.loading import shipped_path
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.steps import read_steps, shipped_steps


def test_the_files_are_what_the_builder_makes(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "build_arithmetic.py"), "--out", str(tmp_path)]
    subprocess.run(words, check=True, env=environment())
    pairs, steps = shipped_path("arithmetic"), shipped_steps()["arithmetic"]
    assert pairs is not None and pairs.read_bytes() == (tmp_path / "arithmetic.jsonl.gz").read_bytes()
    assert steps.read_bytes() == (tmp_path / "steps" / "arithmetic.jsonl.gz").read_bytes()
    assert pairs.stat().st_size + steps.stat().st_size < 300_000


def test_labels_and_comparisons_are_those_of_arithmetic() -> None:
    solutions = read_steps("arithmetic").solutions
    for solution in solutions:
        assert solution.labels == check_steps(str(solution.prompt), solution.steps)
        assert all(0 <= int(step.split("=")[1]) <= LARGEST for step in solution.steps)
    rows = {row.prompt_id: row for row in read_preferences("arithmetic").rows}
    texts = {(solution.prompt_id, "\n".join(solution.steps)) for solution in solutions}
    for row in rows.values():
        score = progress([row.prompt] * 3, row.responses)
        assert score.count(1.0) == 1 and all(score[c.winner] > score[c.loser] for c in row.comparisons)
        assert {(row.prompt_id, text) for text in row.responses} <= texts


def test_a_step_must_go_on_from_the_last_result_with_the_next_operation() -> None:
    for step, right in (("3+2=5", True), ("3-2=1", False), ("2+2=4", False), ("3+2=5.", False), ("3+2=6", False)):
        assert check_steps("3+2-1=", [step]) == [right]
    assert check_steps("3+2-1=", ["3+2=5", "5-1=4", "4+1=5"]) == [True, True, False]
    assert progress(["3+2-1=", [{"role": "user", "content": "3+2-1="}]], ["3+2=5\n\n5-1=4\n", "3+2=5"]) == [1.0, 0.5]
