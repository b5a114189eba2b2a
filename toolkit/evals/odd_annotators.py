"""An annotator who disagrees with the others more than these disagree with each other."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from toolkit.evals.intervals import Floats
from toolkit.evals.winrate import average_within_prompt, permutation_test

ALPHA = 0.05
_MANY = 2_000  # prompts, from which on the flipped sums are normal


@dataclass(frozen=True)
class OddAnnotator:
    """``agreement`` is with the others, ``others_agreement`` of the others with each other: shares of judged pairs."""

    name: str
    agreement: float
    others_agreement: float
    n: int
    p_value: float


@dataclass
class _Judged:
    """Of each unit that an annotator judged: its number, the agreement with the others, and that of the others with
    each other, NaN where there is a single other one."""

    units: array[int] = field(default_factory=lambda: array("q"))
    with_others: array[float] = field(default_factory=lambda: array("d"))
    between: array[float] = field(default_factory=lambda: array("d"))


def odd_annotators(
    units: Sequence[Mapping[str, float]],
    prompts: Sequence[int] | NDArray[np.int64] | None = None,
    alpha: float = ALPHA,
) -> list[OddAnnotator]:
    """Annotators who agree with the others significantly less often than the others agree with each other.

    Each unit is a pair of responses with each annotator's preference for the first; ``prompts`` numbers its prompt,
    None for as many prompts as units. Equal means the same winner, or a tie both times.

    Where three or more annotators judged a unit, the annotator's agreement there is compared with that of the others.
    The mean difference of a prompt may have either sign where the annotator is like the others: a one-sided permutation
    test flips the signs of prompts. For an annotator without such a unit, Fisher's exact test compares the shares over
    prompts. p-values are multiplied by the number of annotators (Bonferroni). Two annotators alone cannot tell who is
    odd.

    >>> units = [{"a": 1.0, "b": 1.0, "c": 0.0}] * 9 + [{"a": 0.0, "b": 1.0, "c": 0.0}]
    >>> [annotator.name for annotator in odd_annotators(units)]
    ['c']
    """
    prompt_N = np.arange(len(units)) if prompts is None else np.asarray(prompts)
    judged: dict[str, _Judged] = {}
    agreement_N = np.full(len(units), np.nan)  # of all annotators of a unit
    for number, unit in enumerate(units):
        same = {pair: _same(unit[pair[0]], unit[pair[1]]) for pair in combinations(unit, 2)}
        of_name = dict.fromkeys(unit, 0.0)
        for (first, second), alike in same.items():
            of_name[first] += alike
            of_name[second] += alike
        n_others, total = len(unit) - 1, float(sum(same.values()))
        agreement_N[number] = total / len(same) if same else np.nan
        for name, equal in of_name.items():
            record = judged.setdefault(name, _Judged())
            if n_others:
                n_between = len(same) - n_others
                record.units.append(number)
                record.with_others.append(equal / n_others)
                record.between.append((total - equal) / n_between if n_between else np.nan)
    tested = [_tested(name, judged[name], agreement_N, prompt_N) for name in sorted(judged)]
    corrected = [(odd, min(1.0, odd.p_value * len(tested))) for odd in tested if odd is not None]
    return [
        OddAnnotator(odd.name, odd.agreement, odd.others_agreement, odd.n, p)
        for odd, p in corrected
        if p <= alpha and odd.agreement < odd.others_agreement
    ]


def _tested(name: str, judged: _Judged, agreement_N: Floats, prompt_N: NDArray[np.generic]) -> OddAnnotator | None:
    """The test of one annotator. ``agreement_N`` and ``prompt_N`` are of all units."""
    units = np.frombuffer(judged.units, np.int64)
    with_others, between = np.frombuffer(judged.with_others), np.frombuffer(judged.between)
    others_N = agreement_N.copy()
    others_N[units] = between
    known = ~np.isnan(others_N)
    if not len(units) or not known.any():
        return None
    both = ~np.isnan(between)
    if both.any():
        _, difference = average_within_prompt(prompt_N[units[both]], (with_others - between)[both])
        p_value = _p_below_zero(difference)
    else:
        from scipy.stats import fisher_exact  # takes longer to import than all the rest

        shares = [
            average_within_prompt(prompt_N[of], values)[1]
            for of, values in ((units, with_others), (np.flatnonzero(known), others_N[known]))
        ]
        table = [[round(float(of.sum())), len(of) - round(float(of.sum()))] for of in shares]
        p_value = float(fisher_exact(table, alternative="less").pvalue)
    return OddAnnotator(name, float(with_others.mean()), float(others_N[known].mean()), len(units), p_value)


def _p_below_zero(differences: Floats) -> float:
    """One-sided p-value of differences (n,) in [-1, 1] whose signs may be flipped."""
    total = float(differences.sum())
    if total >= 0.0:
        return 1.0
    if len(differences) > _MANY:
        return float(ndtr(total / np.sqrt(np.sum(differences**2))))
    two_sided = permutation_test(0.5 + differences / 2.0)
    return 1.0 if two_sided is None else two_sided / 2.0


def _same(a: float, b: float) -> bool:
    return (a > 0.5) == (b > 0.5) and (a < 0.5) == (b < 0.5)
