from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from toolkit.errors import DataError
from toolkit.evals.agreement import krippendorff_alpha
from toolkit.evals.judge_agreement import JudgeAgreement, Opinion, judge_agreement

AB = ("a", "b")


def opinions(judge: str, verdicts: list[float], order: int | None = None) -> list[Opinion]:
    return [Opinion(f"p{k}", AB, judge, v, order) for k, v in enumerate(verdicts)]


def agreement(*parts: list[Opinion], reference: str | None = None) -> JudgeAgreement:
    return judge_agreement([o for part in parts for o in part], reference=reference, n_resamples=100)


def test_by_hand() -> None:
    gold = opinions("gold", [1, 1, 0, 0, 0.5])
    x = opinions("x", [1, 0, 0, 0.5, 1])
    [result] = agreement(gold, x, reference="gold").against_reference
    # the tie of gold is left out: right, wrong, right, half
    assert result.accuracy["value"] == pytest.approx(2.5 / 4) and (result.n, result.n_all) == (4, 5)
    assert result.same_verdict["value"] == pytest.approx(2 / 5)
    assert result.by_order == (None, None)


def test_orders_are_judged_apart_and_together() -> None:
    gold = opinions("gold", [1, 1, 0, 0])
    # always takes the first: right in order 0 where the policy is better, in order 1 where the baseline is
    x = opinions("x", [1, 1, 1, 1], order=0) + opinions("x", [0, 0, 0, 0], order=1)
    [result] = agreement(gold, x, reference="gold").against_reference
    assert result.accuracy["value"] == 0.5
    assert [part and part["value"] for part in result.by_order] == [0.5, 0.5]
    assert result.same_verdict["value"] == 0.0  # over both orders it is always a tie
    y = opinions("y", [1, 1, 0, 0], order=0) + opinions("y", [1, 1, 1, 1], order=1)
    [_, result] = agreement(gold, x, y, reference="gold").against_reference
    assert [part and part["value"] for part in result.by_order] == [1.0, 0.5]
    assert result.accuracy["value"] == 0.75


def test_what_is_half_judged_counts_in_its_order_alone() -> None:
    """A judge that always takes the first failed in order 1: what is left of it would be right on every prompt."""
    gold = opinions("gold", [1, 1, 1, 1])
    whole = opinions("x", [1, 0], order=0) + opinions("x", [1, 0], order=1)
    half = [Opinion(f"p{k}", AB, "x", 1.0, 0, half=True) for k in (2, 3)]
    [result] = agreement(gold, whole, half, reference="gold").against_reference
    assert (result.accuracy["value"], result.n, result.n_all, result.same_verdict["value"]) == (0.5, 2, 2, 0.5)
    assert result.by_order[0] is not None and result.by_order[0]["value"] == 0.75
    other = opinions("y", [1, 1, 1, 1])
    [pair] = agreement(other, whole, half).pairs
    assert pair.n == 2


def test_equals_the_plain_tables() -> None:
    rng = np.random.default_rng(0)
    judged = {name: rng.choice([0.0, 0.5, 1.0], 80, p=[0.4, 0.2, 0.4]) for name in "xyz"}
    result = agreement(*(opinions(name, list(v)) for name, v in judged.items()))
    assert [pair.judges for pair in result.pairs] == [("x", "y"), ("x", "z"), ("y", "z")]
    for pair in result.pairs:
        a, b = (np.sign(judged[name] - 0.5) for name in pair.judges)
        assert pair.cohen_kappa["value"] == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
        assert pair.same_verdict["value"] == pytest.approx(np.mean(a == b)) and pair.n == 80
    plain = krippendorff_alpha([np.sign(v - 0.5) for v in judged.values()], n_resamples=10)
    assert result.krippendorff_alpha is not None
    assert result.krippendorff_alpha["value"] == pytest.approx(plain.value, abs=1e-12)


def test_judges_meet_where_both_judged() -> None:
    x = opinions("x", [1, 1, 0])
    y = [Opinion("p2", AB, "y", 0.0), Opinion("p9", AB, "y", 0.0)]
    [pair] = agreement(x, y).pairs
    assert pair.n == 1 and pair.same_verdict["value"] == 1.0
    other = [Opinion("p0", ("a", "c"), "z", 1.0)]  # another comparison of the same prompt
    assert agreement(x, other).pairs == ()


def test_comparisons_of_a_prompt_are_resampled_together() -> None:
    rng = np.random.default_rng(1)
    same = rng.integers(0, 2, 40)
    pairs = [("a", str(k)) for k in range(8)]
    x = [Opinion(f"p{k}", pair, "x", 1.0) for k in range(40) for pair in pairs]
    y = [Opinion(f"p{k}", pair, "y", float(same[k])) for k in range(40) for pair in pairs]
    result = agreement(x, y)
    [clustered] = result.pairs
    assert result.krippendorff_alpha is not None and result.krippendorff_alpha["n"] == 40
    [plain] = agreement(opinions("x", [1.0] * 320), opinions("y", np.repeat(same, 8).astype(float).tolist())).pairs
    width = [part["ci_high"] - part["ci_low"] for part in (clustered.same_verdict, plain.same_verdict)]  # type: ignore[operator]
    assert clustered.same_verdict["n"] == 40 and width[0] > 2 * width[1]


def test_a_reference_that_judged_nothing() -> None:
    with pytest.raises(DataError, match="'glod' judged nothing"):
        agreement(opinions("gold", [1.0]), opinions("x", [1.0]), reference="glod")
