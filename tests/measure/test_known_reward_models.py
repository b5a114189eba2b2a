"""``scripts/bench/rm_card.py`` and ``rm_bias.py``: both run at their smallest, and their statistics are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.running import ROOT, python

BENCH = ROOT / "scripts/bench"
SMALL = ("--prompts", "16", "--held-out", "12")


def bench(name: str, folder: Path, *words: str) -> dict[str, Any]:
    out = folder / f"{name}.json"
    python(str(BENCH / f"{name}.py"), *SMALL, *words, "--work", str(folder / name), "--out", str(out))
    return dict(json.loads(out.read_text()))


@pytest.fixture
def rm_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import rm_card

    yield rm_card
    for name in ("rm_card", "known_reward_models", "harness"):
        sys.modules.pop(name, None)


def test_rank_correlations_equal_scipys_and_their_tests_hold(rm_card: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=20), rng.normal(size=20)
    assert rm_card.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rm_card.spearman(x, np.ones(20)) != rm_card.spearman(x, np.ones(20))  # nan
    row = rm_card.rank_correlation(x, 2.0 * x + 0.5 * y, 500)
    assert row["ci_low"] <= row["value"] <= row["ci_high"] <= 1.0
    assert rm_card.permutation_p(x, x, 1000) <= 0.002


@pytest.mark.slow
def test_the_bench_of_biases_runs_and_continues(tmp_path: Path) -> None:
    words = ("--seeds", "1", "--unbiased-seeds", "1")
    first = bench("rm_bias", tmp_path, *words)
    assert {name: row.get("found", row)["n"] for name, row in first["summary"].items()} == {
        "length": 1,
        "format": 1,
        "agreement": 1,
        "false_alarms": 1,
    }
    again = bench("rm_bias", tmp_path, *words)
    assert again["models"] == first["models"]  # with its seconds: nothing was trained anew


@pytest.mark.slow
def test_the_bench_of_the_card_runs(tmp_path: Path) -> None:
    result = bench("rm_card", tmp_path, "--models", "4", "--rollouts", "2", "--samples", "1")
    assert len(result["models"]) == 4
    for row in result["figures"]:
        assert -1.0 <= row["with_gold"]["value"] <= 1.0
