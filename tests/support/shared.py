"""What takes long to make, made by one worker for all."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(
    factory: pytest.TempPathFactory, worker_id: str, name: str, make: Callable[[Path], object], last: str
) -> Path:
    """The folder ``name``: the first worker to ask makes it, others wait. ``make`` writes the file ``last`` last.

    ``worker_id`` is the fixture of pytest-xdist.
    """
    own = factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    out = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not (out / last).is_file():
            make(out)
    return out
