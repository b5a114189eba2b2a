"""What an accuracy, a log loss and a Brier score are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from toolkit.evals.agreement import Comparison, comparisons_by_reward, pairwise_accuracy
from toolkit.evals.label_references import label_references
from toolkit.evals.rm_quality import calibration, rm_quality


def two_annotators(n: int = 400) -> tuple[list[Comparison], list[Comparison], list[list[float]]]:
    """Pairs with two labels each: as shares, as one comparison for each label, and the log odds behind them."""
    rng = np.random.default_rng(0)
    q = rng.choice([0.6, 0.75, 0.95], n)
    votes = rng.random((n, 2)) < q[:, None]
    shares: list[Comparison] = [(k, 0, 1, float(votes[k].mean()), 2.0) for k in range(n)]
    single: list[Comparison] = [(k, 0, 1, float(vote), 1.0) for k in range(n) for vote in votes[k]]
    return shares, single, [[float(np.log(p / (1 - p))), 0.0] for p in q]


def test_no_reward_beats_the_ceiling_and_the_labels_share_reaches_it() -> None:
    shares, _, rewards = two_annotators()
    found: dict[str, Any] = rm_quality(shares, rewards, n_resamples=50)
    ceiling = found["references"]["label_ceiling"]
    assert found["accuracy"]["value"] < ceiling["accuracy"]["value"] < 1.0
    assert found["nll"] > ceiling["nll"]["value"] > 0.0 and found["brier"] > ceiling["brier"]["value"] > 0.0
    assert ceiling["accuracy"]["ci_low"] < ceiling["accuracy"]["value"] < ceiling["accuracy"]["ci_high"]
    majority = [[float(p > 0.5), float(p < 0.5)] for _, _, _, p, _ in shares]
    assert pairwise_accuracy(shares, majority).value == pytest.approx(ceiling["accuracy"]["value"])
    share = [[float(np.log(max(p, 1e-9) / max(1 - p, 1e-9))), 0.0] for _, _, _, p, _ in shares]
    best: dict[str, Any] = rm_quality(shares, share, n_resamples=50)
    for name in ("nll", "brier"):
        assert best[name] == pytest.approx(ceiling[name]["value"], abs=1e-6)


def test_a_coin_gets_what_a_coin_gets_whatever_the_labels_are() -> None:
    for comparisons in two_annotators()[:2]:
        coin: dict[str, Any] = rm_quality(comparisons, [[0.0, 0.0]] * 400, n_resamples=50)
        for name in ("nll", "brier", "ece"):
            assert coin[name] == pytest.approx(coin["references"]["coin"][name])
        assert coin["accuracy"]["value"] == coin["references"]["coin"]["accuracy"] == 0.5


def test_losses_do_not_depend_on_how_labels_are_counted() -> None:
    shares, single, rewards = two_annotators()
    found = [calibration(of, rewards, n_resamples=50) for of in (shares, single)]
    for name in ("nll", "brier"):
        assert found[0][name]["value"] == pytest.approx(found[1][name]["value"])


def test_labels_that_never_disagree_have_no_ceiling() -> None:
    found = label_references([(0, 0, 1, 1.0, 1.0), (1, 0, 1, 0.0, 2.0)], [[0.0, 0.0]] * 2)
    assert found["label_ceiling"] is None and "disagree" in found["label_ceiling_reason"]


def test_the_same_pairs_by_a_known_reward() -> None:
    pairs: list[Comparison] = [(0, 0, 1, 0.5, 2.0), (1, 0, 1, 1.0, 1.0), (1, 0, 2, 0.0, 1.0)]
    assert comparisons_by_reward(pairs, [[1.0, 2.0], [3.0, 0.0, 3.0]]) == [
        *((0, 0, 1, 0.0, 2.0), (1, 0, 1, 1.0, 1.0), (1, 0, 2, 0.5, 1.0)),
    ]
