"""What was imported is left out of garbage collection while a stage runs, and no longer."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from toolkit.progress import Reporter
from toolkit.runs.pipeline import in_this_process
from toolkit.stages import data
from toolkit.storage.collecting import imports_left_out


@pytest.fixture(autouse=True)
def _nothing_left_out() -> Iterator[None]:
    """As in a process of its own; these tests leave out what they imported."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_someone_else_left_out_stays_so() -> None:
    with imports_left_out():
        with imports_left_out():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_a_stage_runs_with_its_imports_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def run(*_: Any) -> dict[str, Any]:
        counts.append(gc.get_freeze_count())
        return {}

    monkeypatch.setattr(data, "run", run)
    context: Any = None
    in_this_process(lambda: None)("data", context, {}, Path(), Reporter(quiet=True))
    assert counts[0] > 0 and gc.get_freeze_count() == 0
