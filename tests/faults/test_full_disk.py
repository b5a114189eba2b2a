"""A disk that fills up in the middle of a run: one message names it, and the run goes on to equal weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.running import SMALL, duel, duel_process

from toolkit.cli.main import _system_message

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1062016 vs 1061904"),
        RuntimeError("Error while serializing: No space left on device (os error 28)"),
    ],
)
def test_a_library_that_does_not_say_it_plainly(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["duel", "run", "smoke", "--out", "no/such/folder"])
    message = _system_message(error)
    assert message is not None and "the disk is full" in message and "MiB free)" in message
    assert _system_message(RuntimeError("shapes do not match")) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if os.geteuid() or mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("share", [0.05, 0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])
def test_it_is_named_and_the_run_goes_on(share: float, small_run: Path, small_disk: Path) -> None:
    """``share`` of what the run writes fits."""
    size = sum(path.stat().st_size for path in small_run.rglob("*") if path.is_file())
    subprocess.run(["mount", "-o", f"remount,size={int(share * size)}", small_disk], check=True)
    out = small_disk / "run"
    full = duel_process("run", "smoke", *SMALL, "--out", str(out), check=2)
    assert "the disk is full" in full.stderr and str(small_disk) in full.stderr and "Traceback" not in full.stderr
    subprocess.run(["mount", "-o", "remount,size=500m", small_disk], check=True)
    duel("run", "smoke", *SMALL, "--out", str(out))
    for stage in ("sft", "reward_model", "ppo", "dpo"):
        name = Path(stage, "model", "model.safetensors")
        assert (out / name).read_bytes() == (small_run / name).read_bytes()
