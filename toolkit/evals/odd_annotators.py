"""An annotator who disagrees with the others more than these disagree with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy.special import bdtr

ALPHA = 0.05


@dataclass(frozen=True)
class OddAnnotator:
    """``agreement`` is with the others, ``others_agreement`` of the others with each other: shares of judged pairs."""

    name: str
    agreement: float
    others_agreement: float
    n: int
    p_value: float


def odd_annotators(units: Sequence[Mapping[str, float]], alpha: float = ALPHA) -> list[OddAnnotator]:
    """Annotators who agree with the others significantly less often than the others agree with each other.

    Each unit is a pair of responses with each annotator's preference for the first. Equal means the same winner, or a
    tie both times. Where three or more annotators judged a unit, the annotator's agreement there is compared with that
    of the others in a sign test over units; where units have two annotators only, Fisher's exact test compares the
    shares. p-values are multiplied by the number of annotators (Bonferroni). Two annotators alone cannot tell who is
    odd.

    >>> units = [{"a": 1.0, "b": 1.0, "c": 0.0}] * 9 + [{"a": 0.0, "b": 1.0, "c": 0.0}]
    >>> [annotator.name for annotator in odd_annotators(units)]
    ['c']
    """
    names = sorted({name for unit in units for name in unit})
    tested = [_tested(name, units) for name in names]
    corrected = [(odd, min(1.0, odd.p_value * len(names))) for odd in tested if odd is not None]
    return [
        OddAnnotator(odd.name, odd.agreement, odd.others_agreement, odd.n, p)
        for odd, p in corrected
        if p <= alpha and odd.agreement < odd.others_agreement
    ]


def _tested(name: str, units: Sequence[Mapping[str, float]]) -> OddAnnotator | None:
    agreement: list[float] = []
    others_agreement: list[float] = []
    lower = higher = 0
    for unit in units:
        others = [value for other, value in unit.items() if other != name]
        between = [_same(a, b) for a, b in combinations(others, 2)]
        with_others = [_same(unit[name], value) for value in others] if name in unit else []
        agreement += [_mean(with_others)] if with_others else []
        others_agreement += [_mean(between)] if between else []
        if with_others and between:
            lower += _mean(with_others) < _mean(between)
            higher += _mean(with_others) > _mean(between)
    if not agreement or not others_agreement:
        return None
    if lower + higher:
        p_value = float(bdtr(higher, lower + higher, 0.5))  # of the exact sign test, one-sided
    elif any(len(unit) > 2 for unit in units):
        return None  # always as good as the others
    else:
        from scipy.stats import fisher_exact  # takes longer to import than all the rest

        table = [[round(sum(shares)), len(shares) - round(sum(shares))] for shares in (agreement, others_agreement)]
        p_value = float(fisher_exact(table, alternative="less").pvalue)
    return OddAnnotator(name, _mean(agreement), _mean(others_agreement), len(agreement), p_value)


def _same(a: float, b: float) -> float:
    return float((a > 0.5) == (b > 0.5) and (a < 0.5) == (b < 0.5))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
