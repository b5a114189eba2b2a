"""Intervals of a win rate that rests on few seeds of either arm, and on many prompts.

The seeds of RM + PPO, the seeds of DPO and the prompts are three random factors. Every pair of seeds is compared on
every prompt, so the factors are crossed. The variance of the mean is taken apart as in the analysis of variance of
crossed random effects, and the t quantile has Satterthwaite's degrees of freedom (Satterthwaite 1946, "An Approximate
Distribution of Estimates of Variance Components"; Searle, Casella & McCulloch 1992, "Variance Components", chapters 4
and 5). A bootstrap that resamples seeds and prompts independently (Owen 2007, "The pigeonhole bootstrap"; Owen & Eckles
2012) estimates the same variance, but counts the interaction of seed and prompt more than once, and has no correction
for three to five seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from toolkit.evals.intervals import Floats, interval_without_spread

CONFIDENCE = 0.95
_LEAST_SHARE = 0.5
"""The variance is at least this share of the prompts' part: the difference of mean squares can be near 0, or below."""


@dataclass(frozen=True)
class VarianceParts:
    """What the variance of a crossed mean is made of, in squared units of one observation.

    ``seeds`` has for each arm the variance between its seeds, and ``interaction`` that between its seeds inside a
    prompt. ``by_prompt`` is the variance between prompts of their mean over the present seeds: the prompts' own part,
    and each arm's interaction by its number of seeds, ``n_seeds``. An unbiased estimate can be below 0; it is 0 here.
    """

    seeds: tuple[float, ...]
    interaction: tuple[float, ...]
    by_prompt: float
    n_seeds: tuple[int, ...]

    def variance(self, n_seeds: Sequence[int], n_prompts: int) -> tuple[float, float]:
        """Variance and degrees of freedom of the mean if there were this many seeds in each arm, and prompts."""
        spent = sum(part / k for part, k in zip(self.interaction, self.n_seeds, strict=True))
        by_prompt = max(self.by_prompt - spent, 0.0)
        by_prompt += sum(part / k for part, k in zip(self.interaction, n_seeds, strict=True))
        variance = by_prompt / n_prompts
        spread = variance**2 / (n_prompts - 1)
        for seeds, interaction, k in zip(self.seeds, self.interaction, n_seeds, strict=True):
            variance += seeds / k
            spread += ((seeds + interaction / n_prompts) / k) ** 2 / (k - 1)
        least_df = min(n_seeds) - 1.0
        return variance, max(variance**2 / spread, least_df) if spread > 0.0 else least_df


@dataclass(frozen=True)
class CrossedMean:
    """A mean over crossed seeds and prompts. ``variance``, ``df`` and ``parts`` are None where an arm has one seed.

    Equal values have the variance 0 and no parts. ``unseen`` is the share of comparisons that count as ties because
    their judge, which saw neither response beside the other, says the same of both (:func:`unseen_shares`).
    """

    value: float
    variance: float | None
    df: float | None
    n_prompts: int
    parts: VarianceParts | None = None
    unseen: float = 0.0

    def power(self, threshold: float, n_seeds: Sequence[int], n_prompts: int) -> float:
        """The probability that a study of this size finds the mean to differ from ``threshold``.

        The true mean is taken to be ``value``, and the variances to be ``parts``. A study finds a difference where its
        95% interval leaves out the threshold on the side of the true mean: the upper tail of the noncentral t.

        Raises:
            ValueError: there are no parts.
        """
        if self.parts is None:
            raise ValueError("without variance parts there is no power")
        from scipy.stats import nct as noncentral  # takes long to import, and a report asks for no power

        variance, df = self.parts.variance(n_seeds, n_prompts)
        shift = abs(self.value - threshold) / variance**0.5
        return float(noncentral.sf(stdtrit(df, (1.0 + CONFIDENCE) / 2.0), df, shift))

    def interval(
        self, confidence: float = CONFIDENCE, bounds: tuple[float, float] | None = None
    ) -> tuple[float | None, float | None]:
        """The t interval, cut at ``bounds``. (None, None) where the seeds, or equal values, tell nothing of the spread.

        Equal values with known bounds have the exact binomial interval over prompts.
        """
        if self.variance is None or self.df is None:
            return None, None
        if self.variance == 0.0:
            if bounds is None:
                return None, None
            return interval_without_spread(self.value, self.n_prompts, bounds, confidence)
        half = float(stdtrit(self.df, (1.0 + confidence) / 2.0)) * self.variance**0.5
        low, high = bounds or (-np.inf, np.inf)
        return max(self.value - half, low), min(self.value + half, high)

    def probability_above(self, threshold: float) -> float | None:
        """P(true mean > threshold): the confidence distribution of the t interval, a posterior under a flat prior."""
        if self.variance is None or self.df is None:
            return None
        if self.variance == 0.0:
            tail = 0.5**self.n_prompts  # of the sign test: all prompts on one side
            return 1.0 - tail if self.value > threshold else tail if self.value < threshold else 0.5
        return float(stdtr(self.df, (self.value - threshold) / self.variance**0.5))

    def p_value(self, threshold: float) -> float | None:
        """Two-sided p-value of "the true mean is the threshold", by the same t distribution."""
        above = self.probability_above(threshold)
        return None if above is None else 2.0 * min(above, 1.0 - above)


def crossed_means(*projections_GKN: Floats) -> list[CrossedMean]:
    """Means over seeds and prompts, one for each of G statistics.

    Each of ``projections_GKN`` is of one arm, (G, seeds, prompts): the statistic on that arm's seed and that prompt,
    averaged over the other arm's seeds. All have the same mean over their seeds, (G, prompts).

    With MS the mean squares of seeds (s), prompts (p) and their interaction (e), the variance of the mean is
    ``MS_p/(K N) + sum over arms of (MS_s - MS_e)/(K N)``, which is unbiased, and the degrees of freedom are
    ``V^2 / (sum of (each mean square's term)^2 / its degrees of freedom)``.
    """
    first = projections_GKN[0]
    n = first.shape[2]
    value_G = first.mean(axis=(1, 2))
    by_prompt_GN = first.mean(axis=1)
    if n < 2 or min(p.shape[1] for p in projections_GKN) < 2:
        return [CrossedMean(float(value), None, None, n) for value in value_G]
    prompts_G = by_prompt_GN.var(axis=1, ddof=1) / n
    variance_G, spread_G = prompts_G.copy(), prompts_G**2 / (n - 1)
    between_AG, inside_AG = [], []
    for projection_GKN in projections_GKN:
        k = projection_GKN.shape[1]
        by_seed_GK = projection_GKN.mean(axis=2)
        seeds_G = by_seed_GK.var(axis=1, ddof=1) / k
        residual = projection_GKN - by_seed_GK[:, :, None] - by_prompt_GN[:, None] + value_G[:, None, None]
        inside_G = (residual**2).sum(axis=(1, 2)) / ((k - 1) * (n - 1))
        variance_G += seeds_G - inside_G / (k * n)
        spread_G += seeds_G**2 / (k - 1)
        between_AG.append(np.maximum(k * seeds_G - inside_G / n, 0.0))
        inside_AG.append(inside_G)
    variance_G = np.maximum(variance_G, _LEAST_SHARE * prompts_G)
    variance_G[variance_G < 1e-24] = 0.0  # rounding of equal values
    n_seeds = tuple(p.shape[1] for p in projections_GKN)
    least_df = min(n_seeds) - 1.0
    df_G = np.full_like(value_G, least_df)
    np.divide(variance_G**2, spread_G, out=df_G, where=spread_G > 0.0)
    df_G = np.maximum(df_G, least_df)
    parts = [
        VarianceParts(tuple(map(float, between)), tuple(map(float, inside)), float(prompts) * n, n_seeds)
        for between, inside, prompts in zip(np.transpose(between_AG), np.transpose(inside_AG), prompts_G, strict=True)
    ]
    return [
        CrossedMean(float(value), float(variance), float(df), n, of_mean if variance > 0.0 else None)
        for value, variance, df, of_mean in zip(value_G, variance_G, df_G, parts, strict=True)
    ]
