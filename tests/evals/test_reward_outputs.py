"""Outputs of ensembles and heads of annotators against plain counts."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.evals.ensembles import combined, disagreement
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.reward_outputs import JudgedPair, outputs_report

OPTIONS: BootstrapOptions = {"n_resamples": 200, "confidence": 0.95, "seed": 0}


def test_combinations_are_those_of_the_paper() -> None:
    values = np.random.default_rng(0).normal(size=(5, 4))
    for row, mean, least, weighted, spread in zip(
        values,
        combined(values, "mean"),
        combined(values, "wco"),
        combined(values, "uwo", 0.3),
        disagreement(values),
        strict=True,
    ):
        average = sum(row) / 4
        variance = sum((value - average) ** 2 for value in row) / 4
        assert (mean, least) == (pytest.approx(average), min(row))
        assert weighted == pytest.approx(average - 0.3 * variance) and spread == pytest.approx(variance**0.5)


def test_heads_are_held_against_their_annotators_and_the_majority() -> None:
    rng = np.random.default_rng(1)
    names, n = ["x", "y", "z"], 40
    outputs = [rng.normal(size=(2, 3)) for _ in range(n)]
    scores = [of_prompt.mean(1) for of_prompt in outputs]
    pairs = [JudgedPair(p, 0, 1, {name: float(rng.integers(2)) for name in names[: 1 + p % 3]}) for p in range(n)]
    comparisons = [(pair.prompt, 0, 1, v, 1.0) for pair in pairs for v in pair.preferences.values()]
    report = outputs_report(names, outputs, scores, comparisons, pairs, OPTIONS)

    def right(values: list[float], preference: float) -> bool:
        return bool((values[0] > values[1]) == (preference == 1.0))

    for m, (name, row) in enumerate(zip(names, report["annotators"]["annotators"], strict=True)):
        own = [pair for pair in pairs if name in pair.preferences]
        hits = [right(outputs[pair.prompt][:, m].tolist(), pair.preferences[name]) for pair in own]
        assert row["n"] == len(own) and row["accuracy_of_head"]["value"] == pytest.approx(np.mean(hits))
    votes = [(pair.prompt, np.mean(list(pair.preferences.values()))) for pair in pairs if len(pair.preferences) > 1]
    decided = [(p, float(mean > 0.5)) for p, mean in votes if mean != 0.5]
    majority = report["annotators"]["majority"]
    assert majority["n"] == len(decided)
    assert majority["accuracy_of_score"]["value"] == pytest.approx(
        np.mean([right(scores[p].tolist(), side) for p, side in decided])
    )
    equal = [
        float(a == b)
        for pair in pairs
        for k, a in enumerate(pair.preferences.values())
        for b in list(pair.preferences.values())[k + 1 :]
    ]
    assert report["annotators"]["agreement"]["value"] == pytest.approx(np.mean(equal))
    assert report["disagreement"]["value"] == pytest.approx(np.mean([of_prompt.std(1).mean() for of_prompt in outputs]))


def test_an_ensemble_has_no_annotators() -> None:
    outputs = [np.array([[1.0, 2.0], [0.0, 3.0]])]
    report = outputs_report(["head-0", "head-1"], outputs, [np.array([1.5, 1.5])], [(0, 0, 1, 1.0, 1.0)], [], OPTIONS)
    assert report["annotators"] is None
    assert [row["accuracy"]["value"] for row in report["outputs"]] == [1.0, 0.0]
