"""Style-controlled win rates: what the win rate would be if both responses were written in the same style.

A judge or a person may like long answers, lists, headings and bold type for their own sake. As in Chatbot Arena's style
control (Li, Angelopoulos and Chiang 2024, "Does style matter?"), each of the four is a feature of the comparison,
(policy - baseline) / (policy + baseline). A logistic regression explains the preference by these features and by the
policy itself, and the win rate is its value where no feature differs. Intervals resample prompts and refit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
from toolkit.evals.length_control import lacks_overlap
from toolkit.evals.logistic import MANY_ROWS, Block, DistinctRows, fit_l2_logistic, refit_l2_logistic
from toolkit.evals.winrate import checked_preferences

FEATURES = ("length", "lists", "headers", "bold")
# A weak ridge on the effects of style; on the constant it is there for the arithmetic alone.
_RIDGE = (*(0.1 for _ in FEATURES), 1e-3)
_TOLERANCE = 1e-8
_MIN_ROWS = 25  # five for each coefficient
_CODE = re.compile(r"```.*?(```|\Z)", re.DOTALL)
_LIST = re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]+\S", re.MULTILINE)
_HEADER = re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|(?<!\w)__[^_\n]+__(?!\w)")


@dataclass(frozen=True)
class Style:
    """What a response looks like: its characters, and its list items, headings and bold passages in Markdown."""

    length: int
    lists: int
    headers: int
    bold: int


def style_of(text: str) -> Style:
    r"""The style of a text. A block of code has a length and no Markdown.

    >>> style_of("# Two\n- **a**\n- b")
    Style(length=17, lists=2, headers=1, bold=1)
    """
    prose = _CODE.sub("", text)
    return Style(len(text), *(len(pattern.findall(prose)) for pattern in (_LIST, _HEADER, _BOLD)))


@dataclass(frozen=True)
class StyleControlled:
    """A style-controlled win rate, as a fraction of one.

    ``effects`` are the log odds that a feature adds where only the policy's response has it. A feature that never
    differs has effect 0. ``reason`` says why there is no estimate.
    """

    win_rate: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    effects: dict[str, float] | None = None
    reason: str | None = None


def style_controlled_win_rate(
    preferences: ArrayLike,
    policy: ArrayLike,
    baseline: ArrayLike,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> StyleControlled:
    """Style-controlled win rate of one policy from one row per prompt.

    ``preferences`` (n,) are NaN where there is no judgement. ``policy`` and ``baseline`` (n, 4) are the counts of both
    responses in the order of ``FEATURES``, NaN where they are not known. Rows with a NaN are left out.

    The regression is ``logit p = a . x + c``, with a weak ridge on a, where x are the four feature differences, each in
    [-1, 1]. The win rate is sigmoid(c), and the interval the percentile interval of refits on resampled prompts. There
    is no estimate for fewer than 25 rows, nor where one side has more of a feature on nearly every prompt: such data
    cannot tell policy and style apart.

    Raises:
        DataError: arrays of other shapes.
    """
    check_settings(n_resamples, confidence)
    p_N = checked_preferences(preferences)
    a_NK, b_NK = np.asarray(policy, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if not a_NK.shape == b_NK.shape == (len(p_N), len(FEATURES)):
        raise DataError(
            "every preference needs four counts of each response",
            where=f"{p_N.shape}, {a_NK.shape}, {b_NK.shape}",
        )
    x_NK = np.zeros_like(a_NK)
    np.divide(a_NK - b_NK, a_NK + b_NK, out=x_NK, where=a_NK + b_NK != 0.0)
    usable = np.isfinite(p_N) & np.isfinite(x_NK).all(axis=1)
    p_N, x_NK = p_N[usable], x_NK[usable]
    n = len(p_N)
    if n < _MIN_ROWS:
        return StyleControlled(None, None, None, n, reason=f"{n} prompts; the regression needs {_MIN_ROWS}")
    for name, difference_N in zip(FEATURES, x_NK.T, strict=True):
        if (problem := lacks_overlap(difference_N, name)) is not None:
            return StyleControlled(None, None, None, n, reason=problem)
    if rounded_alike(p_N):
        value = float(p_N[0])
        return StyleControlled(value, *interval_without_spread(value, n, (0.0, 1.0), confidence), n)
    try:
        return _fitted(np.column_stack([x_NK, np.ones(n)]), p_N, n_resamples, confidence, seed)
    except ArithmeticError as error:
        return StyleControlled(None, None, None, n, reason=str(error))


def _fitted(x_NK: Floats, p_N: Floats, n_resamples: int, confidence: float, seed: int) -> StyleControlled:
    """The estimate from features (n, 5), the constant last, and preferences (n,)."""
    n, ridge_K = len(p_N), np.array(_RIDGE)
    beta_K = fit_l2_logistic(x_NK, p_N, np.ones((1, n)), ridge_K, _TOLERANCE)[0]
    if n < MANY_ROWS:
        refits = (fit_l2_logistic(x_NK, p_N, w, ridge_K, _TOLERANCE) for w in resamples(n, n_resamples, seed))
    else:
        rows = DistinctRows.of(p_N, *x_NK.T)
        p_G, first_G, *shared = rows.columns
        shared_KG, weights = np.stack(shared), resamples(n, n_resamples, seed, rows.kind_N)
        refits = (refit_l2_logistic(Block(first_G, shared_KG, w, p_G), beta_K, ridge_K) for w in weights)
    draws_B = np.concatenate([beta_BK[:, -1] for beta_BK in refits])
    low, high = percentile_interval(np.asarray(expit(draws_B), dtype=np.float64), confidence)
    effects = dict(zip(FEATURES, beta_K[:-1].tolist(), strict=True))
    return StyleControlled(float(expit(beta_K[-1])), low, high, n, effects)
