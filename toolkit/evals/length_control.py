"""Length-controlled win rates: what the win rate would be if both responses were equally long.

With AlpacaEval's auxiliary table this is the estimate of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475): a
logistic regression of the preference on tanh of the standardised length difference, the instruction's difficulty and
the policy, evaluated at no length difference. Without the table there is no difficulty and no regularising data, so the
regression is on length and policy alone. Intervals resample prompts and refit: the standard error that AlpacaEval
publishes is the spread of fitted values, which leaves out the uncertainty of the fit.

A win rate at equal length can be estimated only where lengths overlap. If one side is longer on nearly every prompt,
its length and the side itself explain the preference equally well, and the data do not tell them apart. Without the
table the result is then None with a reason. AlpacaEval's estimate stays as it is published: its other rows tie the
effect of length down.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from toolkit.errors import DataError
from toolkit.evals.intervals import (
    Floats,
    check_settings,
    interval_without_spread,
    percentile_interval,
    resamples,
    rounded_alike,
)
from toolkit.evals.logistic import (
    MANY_ROWS,
    Block,
    DistinctRows,
    fit_l1_logistic,
    fit_l2_logistic,
    refit_l2_logistic,
)
from toolkit.evals.winrate import checked_preferences
from toolkit.files import read_json

_CS = np.logspace(-4, 4, 10)  # sklearn's Cs=10, which AlpacaEval uses
# The ridge of the regression without a table: of the effect of length, which keeps separable data finite, and of the
# constant, which is there for the arithmetic alone and moves the win rate by less than 1e-4.
_RIDGE = (0.1, 1e-3)
# The side that is longer on fewer prompts must be so on this share of them, and on this many.
MIN_OVERLAP_SHARE = 0.1
MIN_OVERLAP_PROMPTS = 5
_FOLDS = 5
_FIT_TOLERANCE = 1e-9
# Newton converges quadratically: after a step of 2e-3 the coefficients are within about 1e-6, which is three orders of
# magnitude below the spread of the draws
_DRAW_TOLERANCE = 2e-3


@dataclass(frozen=True)
class LengthTable:
    """AlpacaEval's auxiliary data: the difficulty of each instruction, and rows of "gamed" variants of the baseline.

    The gamed rows have two features (tanh of the standardised length difference, difficulty) and targets that reproduce
    their known sufficient statistics. ``row_weight`` is their weight beside a row of the policy.
    """

    difficulty: dict[str, float]  # by instruction id
    difficulty_by_index: Floats
    gamed_features: Floats  # (n_gamed, 2)
    gamed_targets: Floats
    row_weight: float


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate, as a fraction of one, and the regression behind it.

    ``length`` is the coefficient of tanh(D/sd(D)), where D is the characters of the baseline minus those of the policy.
    ``difficulty`` and ``policy`` are the coefficients of the instruction's difficulty and of the policy itself. ``c``
    is the inverse strength of the L1 penalty; it is None without a table. ``variant`` is ``alpaca_eval`` (with its
    table) or ``length_only``. ``reason`` says why there is no estimate.
    """

    lc_win_rate: float | None
    standard_error: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    length: float | None = None
    difficulty: float | None = None
    policy: float | None = None
    c: float | None = None
    variant: str = "length_only"
    reason: str | None = None


def load_length_table(folder: str | Path) -> LengthTable:
    """Read ``instruction_difficulty*.csv``, ``gamed_features.csv(.gz)`` and ``gamed_sufficient_stats.json``.

    The preferences of the gamed rows are known only through their sufficient statistics, the sums of y*x, which are all
    that a logistic fit sees. The targets are the fitted probabilities of the logistic model with these statistics. They
    have the same sums, and so the same fit, in a form that cross-validation can split.

    Raises:
        DataError: a file is missing or lacks a column.
    """
    folder = Path(folder)
    difficulty_files = sorted(folder.glob("instruction_difficulty*.csv*")) if folder.is_dir() else []
    feature_files = sorted(folder.glob("gamed_features.csv*")) if folder.is_dir() else []
    stats_file = folder / "gamed_sufficient_stats.json"
    if not difficulty_files or not feature_files or not stats_file.is_file():
        raise DataError(
            "not a folder with AlpacaEval's auxiliary table",
            where=str(folder),
            fix="it needs instruction_difficulty*.csv, gamed_features.csv(.gz) and gamed_sufficient_stats.json",
        )
    try:
        instructions = _read_csv(difficulty_files[0])
        by_index = np.array([float(row["instruction_difficulty"]) for row in instructions])
        gamed_x = np.array(
            [(float(r["tanh_std_delta_len"]), by_index[int(r["index"])]) for r in _read_csv(feature_files[0])]
        )
        stats = read_json(stats_file, fix="download AlpacaEval's table again")
        sums = np.array([stats["tanh_std_delta_len"], stats["instruction_difficulty"]], dtype=np.float64)
        row_weight = float(stats["row_weight"])
        in_order = [int(row["index"]) for row in instructions] == list(range(len(instructions)))
        by_id = {row["instruction_id"]: float(row["instruction_difficulty"]) for row in instructions}
    except (KeyError, ValueError, TypeError, IndexError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the length-control table: {error!r}", where=str(folder)) from error
    if not in_order or not len(gamed_x):
        raise DataError("rows must run from index 0 without gaps", where=str(difficulty_files[0]))
    if not all(np.isfinite(values).all() for values in (by_index, gamed_x, sums, np.array(row_weight))):
        raise DataError("the length-control table has numbers that are not finite", where=str(folder))
    targets = _targets_from_sums(gamed_x, sums, str(stats_file))
    return LengthTable(by_id, by_index, gamed_x, targets, row_weight)


def _read_csv(path: Path) -> list[dict[str, str]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(text.decode("utf-8").splitlines()))


def _targets_from_sums(features: Floats, sums: Floats, where: str) -> Floats:
    """Probabilities sigmoid(x.b) whose sum of p*x is ``sums``: the maximum likelihood of the logistic model."""
    b = np.zeros(features.shape[1])
    for _ in range(100):
        p = expit(features @ b)
        try:
            step = np.linalg.solve((features * (p * (1 - p))[:, None]).T @ features, sums - features.T @ p)
        except np.linalg.LinAlgError:
            break
        b += np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-12:
            return np.asarray(expit(features @ b), dtype=np.float64)
    raise DataError("no preferences of the gamed rows have these sufficient statistics", where=where)


@dataclass(frozen=True)
class _Rows:
    """What the regression reads of n prompts that have a preference, both lengths and, with a table, a difficulty."""

    preferences: Floats  # (n,)
    length_difference: Floats  # (n,), characters of the baseline minus characters of the policy
    shared: Floats  # (K, n), features that no resampling changes: the difficulty with a table, and 1 for the policy

    def block(self, standard_deviation: Floats, weights: Floats) -> Block:
        """The rows with the length feature tanh(D/sd); sd is () or (B, 1). Without any spread the feature is 0."""
        scale = np.where(standard_deviation > 0.0, standard_deviation, np.inf)
        return Block(np.tanh(self.length_difference / scale), self.shared, weights, self.preferences)

    def win_rates(self, beta_BK: Floats) -> Floats:
        """Fitted preference of each prompt at no length difference, (B, n)."""
        return np.asarray(expit(beta_BK[:, 1:] @ self.shared), dtype=np.float64)


def length_controlled_win_rate(
    preferences: ArrayLike,
    policy_length: ArrayLike,
    baseline_length: ArrayLike,
    *,
    difficulty: ArrayLike | None = None,
    table: LengthTable | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LengthControlled:
    """Length-controlled win rate of one policy from one row per prompt (n,). Lengths are in characters.

    With ``table`` and the ``difficulty`` of each row the regression is that of AlpacaEval 2: L1 penalised, without an
    intercept, its strength chosen by 5-fold cross-validation. Without them it is ``logit p = a*tanh(D/sd(D)) + c`` with
    a weak ridge on a alone: a penalty on c would pull the win rate towards one half. Rows without a preference or a
    length are left out.

    There is no estimate (``reason`` says why) for fewer than 10 rows, two per fold; without a table where lengths do
    not overlap (:func:`lacks_overlap`); and where the regression does not converge.

    The interval is the percentile interval of refits on resampled prompts. A refit computes sd(D) and all coefficients
    anew; the strength of the penalty and the gamed rows stay. Where all preferences are equal it is the exact binomial
    one.

    Raises:
        DataError: arrays of different lengths, or a table without difficulties.
    """
    check_settings(n_resamples, confidence)
    rows = _usable_rows(preferences, policy_length, baseline_length, difficulty, table)
    n, variant = len(rows.preferences), "alpaca_eval" if table is not None else "length_only"

    def unknown(reason: str) -> LengthControlled:
        return LengthControlled(None, None, None, None, n, variant=variant, reason=reason)

    if n < 2 * _FOLDS:
        return unknown(f"{n} prompts have a preference and both lengths; the regression needs {2 * _FOLDS}")
    try:
        if table is not None:
            return _alpaca_eval(rows, table, n_resamples, confidence, seed)
        if (problem := lacks_overlap(rows.length_difference)) is not None:
            return unknown(problem)
        return _length_only(rows, n_resamples, confidence, seed)
    except ArithmeticError as error:
        return unknown(str(error))


def lacks_overlap(difference_N: Floats, feature: str = "length") -> str | None:
    """Why differences of a feature cannot say what no difference would give; None where they can."""
    first, second = int(np.sum(difference_N <= 0.0)), int(np.sum(difference_N >= 0.0))
    n, fewer = len(difference_N), min(first, second)
    if fewer < MIN_OVERLAP_SHARE * n:
        return (
            f"one side has the larger {feature} on {max(first, second)} of {n} prompts: such data cannot tell the "
            f"effect of {feature} from the policies' own"
        )
    if fewer < MIN_OVERLAP_PROMPTS:
        return f"each side needs the larger {feature} on {MIN_OVERLAP_PROMPTS} prompts or more; one has it on {fewer}"
    return None


def _alpaca_eval(rows: _Rows, table: LengthTable, n_resamples: int, confidence: float, seed: int) -> LengthControlled:
    """The estimate of AlpacaEval 2, with an interval from refits."""
    gamed = [_gamed_block(table)]
    n = len(rows.preferences)
    block = rows.block(rows.length_difference.std(ddof=1), np.ones(n))
    c = _cross_validated_c([block, *gamed])
    start = np.zeros((1, len(rows.shared) + 1))
    beta = fit_l1_logistic([block, *gamed], start, np.array([c]), _FIT_TOLERANCE)[0]
    draws_B = np.concatenate([_refit(rows, gamed, beta, c, counts) for counts in resamples(n, n_resamples, seed)])
    low, high = percentile_interval(draws_B, confidence)
    return LengthControlled(
        float(rows.win_rates(beta[None]).mean()),
        float(draws_B.std(ddof=1)) if n_resamples > 1 else None,
        low,
        high,
        n,
        length=float(beta[0]),
        difficulty=float(beta[1]),
        policy=float(beta[-1]),
        c=c,
        variant="alpaca_eval",
    )


def _length_only(rows: _Rows, n_resamples: int, confidence: float, seed: int) -> LengthControlled:
    """sigmoid(c) of ``logit p = a*tanh(D/sd(D)) + c``."""
    n, p_N, delta_N = len(rows.preferences), rows.preferences, rows.length_difference

    def fit(counts_BN: Floats) -> Floats:
        scale_B1 = _spread(delta_N, counts_BN, n)[:, None]
        length_BN = np.tanh(delta_N / np.where(scale_B1 > 0.0, scale_B1, np.inf))
        x_BNK = np.stack([length_BN, np.ones_like(length_BN)], axis=-1)
        return fit_l2_logistic(x_BNK, p_N, counts_BN, np.array(_RIDGE), _DRAW_TOLERANCE)

    beta = fit(np.ones((1, n)))[0]
    if rounded_alike(p_N):
        value = float(p_N[0])
        standard_error: float | None = 0.0
        low, high = interval_without_spread(value, n, (0.0, 1.0), confidence)
    else:
        value = float(expit(beta[-1]))
        if n < MANY_ROWS:
            draws_B = np.concatenate([expit(fit(counts)[:, -1]) for counts in resamples(n, n_resamples, seed)])
        else:
            draws_B = _refits_of_many(p_N, delta_N, beta, n_resamples, seed)
        standard_error = float(draws_B.std(ddof=1)) if n_resamples > 1 else None
        low, high = percentile_interval(draws_B, confidence)
    return LengthControlled(value, standard_error, low, high, n, length=float(beta[0]), policy=float(beta[-1]))


def _refits_of_many(p_N: Floats, delta_N: Floats, beta_K: Floats, n_resamples: int, seed: int) -> Floats:
    """sigmoid(c) of the refits of :func:`_length_only` on resamples of many prompts, (B,)."""
    n = len(p_N)
    rows = DistinctRows.of(p_N, delta_N)
    (p_G, delta_G), ones = rows.columns, np.ones((1, len(rows.columns[0])))

    def fit(counts_BG: Floats) -> Floats:
        scale_B1 = _spread(delta_G, counts_BG, n)[:, None]
        length_BG = np.tanh(delta_G / np.where(scale_B1 > 0.0, scale_B1, np.inf))
        return refit_l2_logistic(Block(length_BG, ones, counts_BG, p_G), beta_K, np.array(_RIDGE))

    return np.concatenate([expit(fit(counts)[:, -1]) for counts in resamples(n, n_resamples, seed, rows.kind_N)])


def _spread(delta_N: Floats, counts_BN: Floats, n: int) -> Floats:
    """sd(D) with ddof 1 of each resample of n prompts, (B,)."""
    variance_B = (counts_BN @ delta_N**2 - (counts_BN @ delta_N) ** 2 / n) / (n - 1)
    return np.asarray(np.sqrt(np.maximum(variance_B, 0.0)), dtype=np.float64)


def _usable_rows(
    preferences: ArrayLike,
    policy_length: ArrayLike,
    baseline_length: ArrayLike,
    difficulty: ArrayLike | None,
    table: LengthTable | None,
) -> _Rows:
    """The rows that have every value. Raises DataError as :func:`length_controlled_win_rate` says."""
    p_N = checked_preferences(preferences)
    delta_N = np.asarray(baseline_length, dtype=np.float64) - np.asarray(policy_length, dtype=np.float64)
    if (table is None) != (difficulty is None):
        raise DataError("the auxiliary table and the difficulty of each row come together", where="length control")
    difficulty_N = np.zeros_like(p_N) if difficulty is None else np.asarray(difficulty, dtype=np.float64)
    if not p_N.shape == delta_N.shape == difficulty_N.shape:
        shapes = f"{p_N.shape}, {delta_N.shape}, {difficulty_N.shape}"
        raise DataError("every preference needs two lengths", where=shapes)
    usable = np.isfinite(p_N) & np.isfinite(delta_N) & np.isfinite(difficulty_N)
    ones = np.ones((1, int(usable.sum())))
    shared_KN = ones if table is None else np.vstack([difficulty_N[usable][None], ones])
    return _Rows(p_N[usable], delta_N[usable], shared_KN)


def _gamed_block(table: LengthTable) -> Block:
    gamed = table.gamed_features
    shared = np.vstack([gamed[:, 1], np.zeros(len(gamed))])
    return Block(gamed[:, 0], shared, np.full(len(gamed), table.row_weight), table.gamed_targets)


def _refit(rows: _Rows, gamed: list[Block], start_K: Floats, c: float, counts_BN: Floats) -> Floats:
    """Length-controlled win rates (B,) of resamples that draw each prompt ``counts_BN`` times."""
    n = len(rows.preferences)
    blocks = [rows.block(_spread(rows.length_difference, counts_BN, n)[:, None], counts_BN), *gamed]
    starts_BK = np.tile(start_K, (len(counts_BN), 1))
    beta_BK = fit_l1_logistic(blocks, starts_BK, np.full(len(counts_BN), c), _DRAW_TOLERANCE)
    return np.asarray(np.einsum("bn,bn->b", rows.win_rates(beta_BK), counts_BN) / n, dtype=np.float64)


def _cross_validated_c(blocks: Sequence[Block]) -> float:
    """The C with the smallest held-out log loss. Rows are dealt into 5 folds, and a row counts with its weight."""
    sizes = [len(b.targets) for b in blocks]
    fold_N = np.split(np.arange(sum(sizes))[::-1] % _FOLDS, np.cumsum(sizes)[:-1])
    trained = []
    for b, fold in zip(blocks, fold_N, strict=True):
        weights_FN = b.weights * (fold != np.arange(_FOLDS)[:, None])
        trained.append(Block(b.first, b.shared, np.repeat(weights_FN, len(_CS), axis=0), b.targets))
    start = np.zeros((_FOLDS * len(_CS), len(blocks[0].shared) + 1))
    beta_BK = fit_l1_logistic(trained, start, np.tile(_CS, _FOLDS), _FIT_TOLERANCE)
    loss_FC, rows_F = np.zeros((_FOLDS, len(_CS))), np.zeros(_FOLDS)
    for b, fold in zip(blocks, fold_N, strict=True):
        eta = beta_BK[:, :1] * b.first + beta_BK[:, 1:] @ b.shared
        entropy = (b.weights * (np.logaddexp(0.0, eta) - b.targets * eta)).reshape(_FOLDS, len(_CS), -1)
        held_out = fold == np.arange(_FOLDS)[:, None]
        loss_FC += np.einsum("fcn,fn->fc", entropy, held_out)
        rows_F += held_out.sum(axis=1)
    return float(_CS[int(np.argmin((loss_FC / rows_F[:, None]).mean(axis=0)))])
