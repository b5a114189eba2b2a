"""Locks name who holds them, end with their process, and tell a command that was killed here from others."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.running import environment

from toolkit.errors import BusyError, StoreError
from toolkit.files import refuse_existing, refuse_others_file
from toolkit.judging.records import Judgement, is_ours, write_judgements
from toolkit.runs.kinds import RUN_FILES, refuse_others_folder
from toolkit.runs.store import RunFolder
from toolkit.storage.locks import held, holds_out, in_turn, writing

pytestmark = pytest.mark.fault

HOLDER = """
import os, signal, sys
from pathlib import Path
from toolkit.storage.locks import writing
sys.argv[1:] = sys.argv[2:]
with writing(Path(os.environ["OUT"])):
    Path(os.environ["OUT"]).write_text("whole")
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(out: Path, *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "x", *words],
        env=environment(OUT=str(out)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_holder_is_named_and_a_killed_one_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sub" / "rewards.parquet"
    process = holder(out, "rewards", "--beta", "7")
    try:
        with pytest.raises(BusyError, match="another process writes this file") as caught, writing(out):
            pass
        assert f"process {process.pid} on" in str(caught.value) and "duel rewards --beta 7" in str(caught.value)
    finally:
        process.kill()
        process.communicate()
    monkeypatch.setattr(sys, "argv", ["duel", "rewards", "--beta", "0.1"])
    with writing(out) as resumed, pytest.raises(StoreError, match="the file exists"):
        assert not resumed
        refuse_existing(out, force=False)
    assert sorted(path.name for path in out.parent.iterdir()) == ["rewards.parquet"]  # no lock is left behind


def test_the_killed_command_itself_may_replace_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rewards.parquet"
    process = holder(out, "rewards")
    process.kill()
    process.communicate()
    monkeypatch.setattr(sys, "argv", ["duel", "rewards"])

    @holds_out
    def work(*, out: Path) -> None:
        refuse_existing(out, force=False)

    work(out=out)
    with pytest.raises(StoreError, match="the file exists"):  # it has completed
        work(out=out)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"pid": 1}'])
def test_a_damaged_lock_file_holds_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with held(tmp_path / ".lock", "works", tmp_path, fix="") as resumed:
        assert not resumed
        (tmp_path / ".lock").write_bytes(content)  # held, whatever it says
        with pytest.raises(BusyError, match="another process is working on this run\n"), RunFolder(tmp_path).lock():
            pass


def test_equal_questions_are_asked_in_turn(tmp_path: Path) -> None:
    said: list[str] = []
    entered: list[str] = []

    def second() -> None:
        with in_turn(tmp_path / "cache" / "asking.lock", said.append):
            entered.append("second")

    with in_turn(tmp_path / "cache" / "asking.lock", said.append):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        entered.append("first")
    thread.join(timeout=10)
    assert entered == ["first", "second"] and len(said) == 1 and "waiting for its answers" in said[0]


def test_only_what_duel_wrote_is_replaced(tmp_path: Path) -> None:
    ours, users = tmp_path / "j.parquet", tmp_path / "thesis.parquet"
    write_judgements([Judgement("p", "a", "b", "gold", 1.0)], ours)
    users.write_text("years of work")
    refuse_others_file(ours, False, is_ours)
    refuse_others_file(tmp_path / "new", False, is_ours)
    refuse_others_file(users, True, is_ours)
    for force, words in ((False, "give --force"), (None, "choose another --out")):
        with pytest.raises(StoreError, match="did not write it") as caught:
            refuse_others_file(users, force, is_ours)
        assert words in caught.value.fix
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(StoreError, match="did not write it"):
        refuse_others_folder(tmp_path, "run", RUN_FILES)
