"""What a verdict promises, over simulated studies with known arms: scripts/bench/study_coverage.py, made small."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import product
from types import ModuleType
from typing import Any

import pytest
from support.running import ROOT

pytestmark = pytest.mark.parity


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


# A coverage of 95% has a standard deviation of 1.3% over 300 studies, and of 2.2% over 100.
STUDIES = pytest.mark.parametrize(
    ("studies", "most_off"), [(100, 0.06), pytest.param(300, 0.035, marks=pytest.mark.slow)], ids=["short", "long"]
)


@STUDIES
@pytest.mark.parametrize(("seeds", "curves"), [(3, "equal"), (3, "crossing"), (5, "apart")])
def test_intervals_cover_and_equal_arms_are_undecided(
    coverage: ModuleType, seeds: int, curves: str, studies: int, most_off: float
) -> None:
    result = coverage.summary(coverage.Design(seeds, 100, 0.1, curves), studies)
    for name in coverage.INTERVALS:  # one point of the curve and the effort too
        assert result[name]["coverage"] == pytest.approx(0.95, abs=most_off), name
        assert abs(result[name]["bias"]) <= 0.01, name
    if curves == "equal":
        assert result["undecided"] >= 0.95
    if curves == "apart":
        assert result["rm_ppo"] >= 0.9 and result["dpo"] == 0.0


@STUDIES
@pytest.mark.parametrize("of_another_kind", [{"values": "preference"}, {"dpo_seeds": 5}, {"controls": True}])
def test_intervals_of_other_studies_cover(
    coverage: ModuleType, of_another_kind: dict[str, Any], studies: int, most_off: float
) -> None:
    result = coverage.summary(coverage.Design(3, 100, 0.1, "crossing", **of_another_kind), studies)
    steps = [name for name in result if name.startswith(("dpo to", "online_dpo to", "rloo to"))]
    assert len(steps) == (8 if "controls" in of_another_kind else 0)  # three steps and their sum, in two measures
    for name in (*coverage.INTERVALS, *steps):
        assert result[name]["coverage"] == pytest.approx(0.95, abs=most_off), name


def recorded() -> dict[str, Any]:
    return dict(json.loads((ROOT / "scripts/bench/results/study_coverage.json").read_text()))


def test_the_committed_simulation_keeps_the_promise(coverage: ModuleType) -> None:
    results = recorded()
    assert min(results["studies"].values()) >= 500
    designs = {(row["seeds"], row["prompts"], row["seed_sd"], row["curves"]) for row in results["coverage"]}
    assert designs == set(product((3, 5), (100, 300), (0.0, 0.1, 0.3), ("equal", "crossing", "apart")))
    for row in results["coverage"]:
        assert all(0.93 <= row[name]["coverage"] <= 0.97 for name in coverage.INTERVALS), row
        assert row["curves"] != "equal" or row["undecided"] >= 0.95


def test_the_picture_shows_the_committed_power_curves(coverage: ModuleType) -> None:
    picture = (ROOT / "docs/images/study-power.svg").read_text(encoding="utf-8")
    assert picture == coverage.power_chart.svg(recorded()["power"])
