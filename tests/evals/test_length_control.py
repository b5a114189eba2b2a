from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import DataError
from toolkit.evals import length_control
from toolkit.evals.length_control import length_controlled_win_rate, load_length_table
from toolkit.evals.logistic import Block, fit_l1_logistic


def simulated(
    n: int, length_effect: float, policy_effect: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    baseline, policy = rng.integers(100, 900, n), rng.integers(400, 1800, n)
    delta = (baseline - policy).astype(float)
    p = 1 / (1 + np.exp(-(length_effect * np.tanh(delta / delta.std(ddof=1)) + policy_effect)))
    return (rng.random(n) < p).astype(float), policy.astype(float), baseline.astype(float)


def gapped(
    n: int, gap: float, length_effect: float, seed: int, *, shape: str = "saturated"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The baseline is longer by ``gap`` standard deviations; at equal length the log odds are 0.5."""
    rng = np.random.default_rng(seed)
    delta = rng.normal(gap, 1.0, n)
    seen = {
        "none": 0.0 * delta,
        "linear": delta,
        "saturated": np.tanh(delta / delta.std(ddof=1)),
        "step": np.sign(delta),
    }
    p = 1 / (1 + np.exp(-(length_effect * seen[shape] + 0.5)))
    return (rng.random(n) < p).astype(float), 500.0 - 100.0 * delta, np.full(n, 500.0)


def write_table(folder: Path, n: int = 60, sums: tuple[float, float] = (-1.0, 2.0)) -> None:
    rng = np.random.default_rng(0)
    rows = [f"{k},id{k},set,100,{v}" for k, v in enumerate(rng.normal(size=n))]
    header = "index,instruction_id,dataset,len_baseline,instruction_difficulty"
    (folder / "instruction_difficulty.csv").write_text("\n".join([header, *rows]))
    gamed = [f"m,{k},{v}" for k, v in enumerate(rng.uniform(-1, 1, n))]
    (folder / "gamed_features.csv").write_text("\n".join(["model,index,tanh_std_delta_len", *gamed]))
    stats = {"tanh_std_delta_len": sums[0], "instruction_difficulty": sums[1], "row_weight": 0.1}
    (folder / "gamed_sufficient_stats.json").write_text(json.dumps(stats))


def test_length_bias_is_removed() -> None:
    # the judge only likes length, the policies are equal, and the policy writes about twice as much
    preferences, policy, baseline = simulated(3000, -2.0, 0.0, 1)
    assert preferences.mean() > 0.7
    fit = length_controlled_win_rate(preferences, policy, baseline, n_resamples=300)
    assert fit.ci_low < 0.5 < fit.ci_high and fit.ci_high - fit.ci_low < 0.12  # type: ignore[operator]
    assert fit.length == pytest.approx(-2.0, abs=0.3) and fit.difficulty is None and fit.n == 3000


def test_interval_covers_the_truth() -> None:
    truth = 1 / (1 + np.exp(-0.5))
    inside = 0
    for seed in range(100):
        fit = length_controlled_win_rate(*gapped(200, 0.5, -1.0, seed), n_resamples=200, seed=seed)
        inside += fit.ci_low <= truth <= fit.ci_high  # type: ignore[operator]
    assert 88 <= inside <= 99


@pytest.mark.parametrize("shape", ["none", "linear", "saturated", "step"])
@pytest.mark.parametrize("gap", [0.0, 1.0, 1.5, 2.0, 4.0, 12.0])
def test_any_gap_between_lengths_gives_the_truth_or_a_reason(gap: float, shape: str) -> None:
    """Lengths that lie ``gap`` standard deviations apart, and a judge who likes length in four ways."""
    truth, known, inside = 1 / (1 + np.exp(-0.5)), 0, 0
    for seed in range(20):
        data = gapped(200, gap, -1.0, seed, shape=shape)
        fit = length_controlled_win_rate(*data, n_resamples=200, seed=seed)
        if fit.lc_win_rate is None:
            assert fit.ci_low is None and fit.ci_high is None and "of 200 prompts" in (fit.reason or "")
        else:
            known += 1
            inside += fit.ci_low <= truth <= fit.ci_high  # type: ignore[operator]
    assert inside >= 0.8 * known  # of 20 intervals of 95%, 16 cover in all but one case in ten thousand
    assert known == 20 if gap <= 1.0 else known < 20 if gap < 2.0 else known == 0


def test_a_side_that_is_always_longer_has_no_estimate() -> None:
    """A preference of 0.2 that does not depend on length: the regression used to end in an ArithmeticError."""
    rng = np.random.default_rng(0)
    preferences = (rng.random(200) < 0.2).astype(float)
    fit = length_controlled_win_rate(preferences, rng.normal(450, 40, 200), rng.normal(95, 50, 200), n_resamples=200)
    assert (fit.lc_win_rate, fit.ci_low, fit.ci_high) == (None, None, None)
    assert fit.reason is not None and "200 of 200 prompts" in fit.reason


def test_the_constant_is_not_pulled_to_one_half() -> None:
    preferences = np.array([1.0] * 11 + [0.0])
    fit = length_controlled_win_rate(preferences, np.full(12, 80.0), np.full(12, 80.0), n_resamples=50)
    assert fit.lc_win_rate == pytest.approx(11 / 12, abs=1e-3)
    won = length_controlled_win_rate(np.ones(20), np.full(20, 80.0), np.full(20, 80.0), n_resamples=50)
    assert won.lc_win_rate == 1.0 and won.ci_low == pytest.approx(0.025 ** (1 / 20))


def test_draws_equal_refits_to_full_convergence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_table(tmp_path)
    table = load_length_table(tmp_path)
    data = simulated(60, -1.0, -1.5, 7)
    fast = length_controlled_win_rate(*data, difficulty=table.difficulty_by_index, table=table, n_resamples=150)
    monkeypatch.setattr(length_control, "_DRAW_TOLERANCE", 1e-10)
    exact = length_controlled_win_rate(*data, difficulty=table.difficulty_by_index, table=table, n_resamples=150)
    assert (fast.ci_low, fast.ci_high) == pytest.approx((exact.ci_low, exact.ci_high), abs=1e-4)
    assert fast.lc_win_rate == exact.lc_win_rate


@pytest.mark.parametrize("digits", [0, 6])  # differences of length that repeat, and that do not
def test_refits_of_many_prompts_equal_those_from_zero(monkeypatch: pytest.MonkeyPatch, digits: int) -> None:
    rng = np.random.default_rng(8)
    difference = np.round(rng.normal(3.0, 20.0, 900), digits)
    preferences = (rng.random(900) < 1 / (1 + np.exp(-difference / 20))).astype(float)
    preferences[::9] = 0.5
    lengths = 500.0 - difference, np.full(900, 500.0)
    monkeypatch.setattr(length_control, "_DRAW_TOLERANCE", 1e-9)
    expected = length_controlled_win_rate(preferences, *lengths, n_resamples=300, seed=2)
    monkeypatch.setattr(length_control, "MANY_ROWS", 900)
    result = length_controlled_win_rate(preferences, *lengths, n_resamples=300, seed=2)
    assert expected.lc_win_rate == result.lc_win_rate and expected.length == pytest.approx(result.length)
    assert (result.standard_error, result.ci_low, result.ci_high) == pytest.approx(
        (expected.standard_error, expected.ci_low, expected.ci_high), abs=1e-7
    )
    assert result.standard_error != expected.standard_error  # it did take another way, whose last digits differ


def test_targets_reproduce_the_sufficient_statistics(tmp_path: Path) -> None:
    write_table(tmp_path)
    table = load_length_table(tmp_path)
    assert table.gamed_targets @ table.gamed_features == pytest.approx([-1.0, 2.0], abs=1e-9)
    assert table.difficulty["id3"] == table.difficulty_by_index[3] and table.row_weight == 0.1


def test_strong_penalty_gives_exact_zeros() -> None:
    rng = np.random.default_rng(0)
    noise, targets = rng.normal(size=50), (rng.random(50) < 0.9).astype(float)
    beta = fit_l1_logistic(
        [Block(noise, np.ones((1, 50)), np.ones(50), targets)], np.zeros((2, 2)), np.array([1e-4, 0.1]), 1e-9
    )
    assert beta[0].tolist() == [0.0, 0.0]
    assert beta[1, 0] == 0.0 and beta[1, 1] > 0.1  # the noise feature is dropped, the constant is kept


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    preferences = np.array([1.0] * 30 + [0.0] * 20)
    fit = length_controlled_win_rate(preferences, np.full(50, 80.0), np.full(50, 80.0), n_resamples=50)
    assert fit.lc_win_rate == pytest.approx(0.6, abs=0.01) and fit.length == 0.0


def test_rows_without_preference_or_length_are_left_out() -> None:
    preferences, policy, baseline = simulated(100, -1.0, 0.3, 3)
    preferences[:5], policy[5:10] = np.nan, np.nan
    assert length_controlled_win_rate(preferences, policy, baseline, n_resamples=20).n == 90
    few = length_controlled_win_rate([1.0, 0.0], [1, 2], [3, 4])
    assert few.lc_win_rate is None and few.n == 2


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="auxiliary table"):
        load_length_table(tmp_path / "nowhere")
    write_table(tmp_path, sums=(-1.0, 500.0))
    with pytest.raises(DataError, match="sufficient statistics"):
        load_length_table(tmp_path)
    write_table(tmp_path)
    (tmp_path / "gamed_sufficient_stats.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read"):
        load_length_table(tmp_path)
    write_table(tmp_path)
    with pytest.raises(DataError, match="come together"):
        length_controlled_win_rate([1.0], [1], [1], table=load_length_table(tmp_path))
