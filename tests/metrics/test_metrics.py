from __future__ import annotations

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest

import toolkit.metrics
from toolkit.evals.winrate import win_rate

FOLDER = Path(toolkit.metrics.__file__).parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)


def test_win_rate_metric_equals_the_function() -> None:
    metric = evaluate.load(str(FOLDER / "win_rate"))
    preferences = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=50).tolist()
    result = metric.compute(preferences=preferences, n_resamples=200, seed=3)
    expected = win_rate(preferences, policy="policy", baseline="baseline", judge="judge", n_resamples=200, seed=3)
    assert result == expected.as_dict()


def test_win_rate_metric_averages_prompts_and_counts_failures() -> None:
    metric = evaluate.load(str(FOLDER / "win_rate"))
    result = metric.compute(preferences=[1.0, 0.0, 1.0, math.nan, None], prompt_ids=["a", "a", "b", "c", "c"])
    assert result["win_rate"] == 0.75 and result["tie"] == 0.5
    assert (result["n_prompts"], result["n_judged"], result["n_failed"]) == (3, 2, 2)


def test_win_rate_metric_takes_batches() -> None:
    metric = evaluate.load(str(FOLDER / "win_rate"))
    metric.add_batch(preferences=[1.0, 1.0])
    metric.add_batch(preferences=[0.5, 0.0])
    assert metric.compute()["win_rate"] == 0.625


def test_pairwise_agreement_metric() -> None:
    metric = evaluate.load(str(FOLDER / "pairwise_agreement"))
    result = metric.compute(predictions=[1.5, -0.2, 0.0, 0.3], references=[1.0, 1.0, 1.0, 0.5])
    assert result["accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert result["n"] == result["n_pairs"] == 4 and result["ci_low"] < 0.5 < result["ci_high"]
    joined = metric.compute(predictions=[1.0, -1.0, 2.0], references=[1.0, 1.0, 1.0], prompt_ids=["a", "a", "b"])
    assert joined["accuracy"] == pytest.approx(2 / 3) and joined["n"] == 2
