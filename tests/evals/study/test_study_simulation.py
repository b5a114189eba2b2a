"""What a verdict promises, over simulated studies with known arms: scripts/bench/study_coverage.py, made small."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest
from support.running import ROOT

pytestmark = pytest.mark.parity
VERDICT = ("best", "matched_kl", "matched_compute")


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts" / "bench"))
        specification = importlib.util.spec_from_file_location(
            "study_coverage", ROOT / "scripts" / "bench" / "study_coverage.py"
        )
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules["study_coverage"] = module
        specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("seeds", "curves"), [(3, "equal"), (3, "crossing"), (5, "apart")])
def test_intervals_cover_and_equal_arms_are_undecided(coverage: ModuleType, seeds: int, curves: str) -> None:
    """300 studies: a coverage of 95% has a standard deviation of 1.3%."""
    result = coverage.summary(coverage.Design(seeds, 100, 0.1, curves), 300)
    for name in coverage.INTERVALS:  # one point of the curve and the effort too
        assert 0.915 <= result[name]["coverage"] <= 0.985, name
        assert abs(result[name]["bias"]) <= 0.01, name
    if curves == "equal":
        assert result["undecided"] >= 0.95
    if curves == "apart":
        assert result["rm_ppo"] >= 0.9 and result["dpo"] == 0.0


def test_the_committed_simulation_keeps_the_promise() -> None:
    results = json.loads((ROOT / "scripts/bench/results/study_coverage.json").read_text())
    designs = [row for row in results["coverage"] if row["seeds"] >= 3]
    assert {(row["seeds"], row["prompts"]) for row in designs} == {(3, 100), (3, 300), (5, 100), (5, 300)}
    assert results["studies"] >= 500
    for row in designs:
        assert all(0.93 <= row[name]["coverage"] <= 0.97 for name in VERDICT), row
        assert row["curves"] != "equal" or row["undecided"] >= 0.95
