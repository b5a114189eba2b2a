"""Commands that are killed and run again leave what an uninterrupted one leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.kill import kill

pytestmark = [pytest.mark.fault, pytest.mark.e2e]


def test_a_few_kills(small_run: Path, tmp_path: Path) -> None:
    counts, wrong = kill(4, 0, ["simulate"], tmp_path, small_run)
    assert not wrong and counts["simulate"].kills == 4 and counts["simulate"].equal == counts["simulate"].trials


@pytest.mark.slow
def test_a_hundred_kills_over_all_commands(small_run: Path, tmp_path: Path) -> None:
    counts, wrong = kill(100, 0, [], tmp_path, small_run)
    assert not wrong and sum(of.kills for of in counts.values()) >= 100
