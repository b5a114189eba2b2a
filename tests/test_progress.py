"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit import progress
from toolkit.progress import PROGRESS_FILE, Reporter, RunLog

SHOW = """
from toolkit.progress import Reporter
with Reporter(quiet={quiet}).in_stage("sft", position="1/2") as reporter:
    with reporter.task("sample", 4) as task:
        for _ in range(4):
            task.advance(1, note="loss 0.5", tokens=100)
    reporter.line("done")
"""


def on_terminal(quiet: bool = False, **environment: str) -> str:
    """What a terminal of 160 columns gets."""
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    settings = {**kept, "TERM": "xterm-256color", "COLUMNS": "160", **environment}
    code = SHOW.format(quiet=quiet)
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=settings) as shown:
        os.close(theirs)
        out = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux says that the other side is closed
                break
            if not part:
                break
            out += part
    assert shown.returncode == 0
    return out.decode()


def test_a_terminal_gets_bars_with_speed_and_memory() -> None:
    text = on_terminal()
    assert "tokens/s" in text and "GiB" in text and "loss 0.5" in text and "4/4" in text
    assert "\x1b[32m" in text  # green
    assert text.rstrip().endswith("[1/2 sft] done")


def test_no_color_means_no_colour() -> None:
    text = on_terminal(NO_COLOR="1")
    assert "tokens/s" in text
    colours = [f"\x1b[{code}" for code in (*range(30, 38), *range(90, 98), "38;")]
    assert not any(f"{colour}m" in text or f"{colour};" in text for colour in colours)


def test_quiet_says_nothing() -> None:
    assert on_terminal(quiet=True) == ""


def test_elsewhere_plain_lines_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    reporter = Reporter()
    with reporter.task("sample", 6) as task:
        for _ in range(6):
            task.advance(1, tokens=40)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) < 6 and all("\x1b" not in line for line in lines)
    assert "tokens/s" in lines[0] and "left" in lines[0] and "GiB" in lines[0]


def test_how_far_it_is_lies_in_the_run_folder(tmp_path: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reporter = Reporter(quiet=True, stage="dpo", log=RunLog(tmp_path))
    with reporter.task("dpo", 10) as task:
        now[0] = 2.0
        task.advance(2)
        first = json.loads((tmp_path / PROGRESS_FILE).read_text())
        task.advance(2)  # within the second: not written
        assert json.loads((tmp_path / PROGRESS_FILE).read_text()) == first
        now[0] = 10.0
        task.advance(6, note="loss 1")
    last = json.loads((tmp_path / PROGRESS_FILE).read_text())
    assert (first["stage"], first["done"], first["total"], first["left_s"]) == ("dpo", 2, 10, 8.0)
    assert (last["done"], last["left_s"], last["note"]) == (10, None, "loss 1")
    assert list(tmp_path.iterdir()) == [tmp_path / PROGRESS_FILE]


GROW = """
import time
from toolkit.progress import resident_gib
before = resident_gib()
block = bytearray(b"x" * (256 << 20))
until = time.monotonic() + 20
while not 0.2 < resident_gib() - before < 0.4 and time.monotonic() < until:
    time.sleep(0.1)  # some kernels count pages late
print(resident_gib() - before, len(block))
"""


def test_resident_memory_is_of_this_process() -> None:
    """In a process of its own: memory that earlier tests freed could be handed out again, or be freed meanwhile."""
    shown = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True).stdout
    assert 0.2 < float(shown.split()[0]) < 0.4
