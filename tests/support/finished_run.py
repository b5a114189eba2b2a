"""A finished run that tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.running import SMALL, duel
from support.shared import made_once


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A finished run of smoke in the smallest useful size. Copy it before you change it.

    Each worker has a copy of its own: commands that only read a run lock its folder.
    """

    def run(out: Path) -> None:
        duel("run", "smoke", "--out", str(out), *SMALL)

    made = made_once(tmp_path_factory, worker_id, "finished-run", run, "report.html")
    return shutil.copytree(made, tmp_path_factory.mktemp("finished") / "small")
