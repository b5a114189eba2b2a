"""Numbers as text."""

from __future__ import annotations

import pytest

from toolkit.report.numbers import count, interval, number, p_value, percent


@pytest.mark.parametrize("form", [percent, number, count, p_value])
def test_what_is_not_known_is_a_dash_or_what_the_caller_wants(form) -> None:  # type: ignore[no-untyped-def]
    assert form(None) == "-" and form(None, absent="") == ""
    assert interval(None, 0.5) == interval(0.5, None) == "-"


@pytest.mark.parametrize(("value", "text"), [(-0.0004, "0.000"), (-1.5, "-1.500"), (1234.5, "1,234.500")])
def test_numbers_have_no_negative_zero(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(1e-9, "<0.001"), (0.0007, "<0.001"), (0.001, "0.001"), (0.0314, "0.031")])
def test_a_p_value_is_never_0(value: float, text: str) -> None:
    assert p_value(value) == text
