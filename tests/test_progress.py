"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
import warnings
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


def test_our_notes_stand_between_the_lines_and_other_warnings_do_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("toolkit", "py.warnings"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    try:
        with Reporter().in_stage("sft", position="2/7") as reporter:
            progress.show_notes(reporter)
            logging.getLogger("toolkit.models.load").warning("%d weights are new", 3)
            logging.getLogger("toolkit.models.load").info("not shown")
            warnings.warn("of a library", stacklevel=1)
            progress.show_notes(reporter)  # a second time changes nothing
            logging.getLogger("toolkit").warning("once")
    finally:
        logging.captureWarnings(False)
    assert capsys.readouterr().err.splitlines() == ["[2/7 sft] note: 3 weights are new", "[2/7 sft] note: once"]


def test_a_reporter_without_a_run_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reporter = Reporter(quiet=True)
    reporter.log("sft", {"loss": 1.0})
    with reporter.task("sft", 2) as task:
        task.advance()
    assert list(tmp_path.iterdir()) == [] and reporter.trackers.names == ()


def test_the_log_of_a_run(tmp_path: Path) -> None:
    reporter = Reporter(quiet=True, log=RunLog(tmp_path))
    reporter.log("sft", {"step": 1, "loss": 0.5})
    reporter.log("dpo", {"step": 2})
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["step"]) for entry in entries] == [("sft", 1), ("dpo", 2)]
    assert entries[0]["loss"] == 0.5 and entries[0]["time"] > 0
