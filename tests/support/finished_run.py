"""A finished run that tests of a worker share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.running import SMALL, duel


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of smoke in the smallest useful size. Copy it before you change it."""
    out = tmp_path_factory.mktemp("finished") / "small"
    duel("run", "smoke", "--out", str(out), *SMALL)
    return out
