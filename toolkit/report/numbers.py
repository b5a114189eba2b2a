"""Numbers as text, alike on the terminal, in notebooks, on model cards and on the report's page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

ABSENT = "-"


def percent(value: float | None, digits: int = 1, *, absent: str = ABSENT) -> str:
    """A fraction of one as a percentage, without a negative zero.

    >>> percent(0.5156), percent(None), percent(-0.0001)
    ('51.6%', '-', '0.0%')
    """
    if value is None:
        return absent
    text = f"{value:.{digits}%}"
    return text.lstrip("-") if float(text[:-1]) == 0 else text


def number(value: float | None, digits: int = 3, *, sign: bool = False, absent: str = ABSENT) -> str:
    """A number with fixed digits and without a negative zero.

    >>> number(1234.5678), number(-0.0001), number(0.25, 2, sign=True)
    ('1,234.568', '0.000', '+0.25')
    """
    if value is None:
        return absent
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return text.lstrip("+-") if float(text.replace(",", "")) == 0 else text


def count(value: float | None, *, absent: str = ABSENT) -> str:
    """A whole number.

    >>> count(34358)
    '34,358'
    """
    return absent if value is None else f"{value:,.0f}"


def confidence_level(value: float) -> str:
    """The confidence of intervals, with all its digits.

    >>> confidence_level(0.95), confidence_level(0.975)
    ('95%', '97.5%')
    """
    return f"{100 * value:g}%"


def dollars(value: float) -> str:
    """A price in dollars: two digits behind the point, and more where they would say nothing.

    >>> dollars(12.5), dollars(0.1452), dollars(0.00412), dollars(0)
    ('$12.50', '$0.15', '$0.0041', '$0.00')
    """
    return f"${value:,.2f}" if value >= 0.1 or value == 0 else f"${value:.2g}" if value >= 1e-4 else "<$0.0001"


def probability(value: float | None, *, absent: str = ABSENT) -> str:
    """Two digits of a probability, which is never 0 or 1.

    >>> probability(0.974), probability(0.9991), probability(1e-4)
    ('0.97', '>0.99', '<0.01')
    """
    if value is None:
        return absent
    return ">0.99" if value > 0.995 else "<0.01" if value < 0.005 else f"{value:.2f}"


def p_value(value: float | None, *, absent: str = ABSENT) -> str:
    """Three digits of a p-value, which is never 0.

    >>> p_value(0.0314), p_value(1e-9)
    ('0.031', '<0.001')
    """
    return absent if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def length_control_name(rows: Iterable[Mapping[str, Any]]) -> str:
    """Which length-controlled win rate these rows of win rates have; they differ on the same judgements.

    >>> length_control_name([{"lc_win_rate": 0.2, "lc_variant": "length_only"}])
    'by length alone'
    >>> length_control_name([{"lc_win_rate": 0.1, "lc_variant": "alpaca_eval"}, {"lc_win_rate": None}])
    "with AlpacaEval's table"
    """
    names = {"alpaca_eval": "with AlpacaEval's table", "length_only": "by length alone"}
    variants = dict.fromkeys(row.get("lc_variant") for row in rows if row["lc_win_rate"] is not None)
    return ", ".join(names[variant] for variant in variants if variant is not None)


def interval(low: float | None, high: float | None, form: Callable[[float], str] = percent) -> str:
    """
    >>> interval(0.42, 0.558)
    '42.0% to 55.8%'
    """
    return ABSENT if low is None or high is None else f"{form(low)} to {form(high)}"
