"""Run folders: files are whole or absent, finished stages are never lost, foreign folders never taken."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import StoreError
from toolkit.files import (
    copy_whole,
    file_fingerprint,
    fingerprint,
    flat,
    folder_fingerprint,
    read_json,
    write_json,
    write_table,
)
from toolkit.runs.store import SCHEMA_VERSION, STAGE_FILE, RunFolder, StageState

FIELDS = {"sft": {"learning_rate": 1e-4, "epochs": 1}, "data": "abc"}


def finished(run: RunFolder, stage: str, key: str, text: str = "work", fields: object = None) -> None:
    """Go through a stage as the pipeline does."""
    run.create()
    work = run.work_dir(stage, key)
    work.mkdir(parents=True, exist_ok=True)
    (work / "result.txt").write_text(text)
    run.finish(stage, key, {"fields": FIELDS if fields is None else fields})


def result(run: RunFolder, stage: str) -> str:
    return (run.stage_dir(stage) / "result.txt").read_text()


# ---------------------------------------------------------------- fingerprints

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), values, max_size=4))
def test_a_fingerprint_does_not_see_the_order_of_keys(value: dict[str, object]) -> None:
    turned = dict(reversed(list(value.items())))
    assert fingerprint(value) == fingerprint(turned) == fingerprint(json.loads(json.dumps(value)))
    assert len(fingerprint(value)) == 16
    assert fingerprint(value) != fingerprint({**value, "more": 1, "x" * 9: 2})


def test_fingerprints_see_every_byte_and_name(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    (tmp_path / "b.txt").write_text("ignored")
    first = folder_fingerprint(tmp_path, ["*.bin", "a.*"])
    (tmp_path / "b.txt").write_text("still ignored")
    assert folder_fingerprint(tmp_path, ["*.bin"]) == first
    (tmp_path / "a.bin").write_bytes(b"\x00\x02")
    assert folder_fingerprint(tmp_path, ["*.bin"]) != first
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    (tmp_path / "a.bin").rename(tmp_path / "c.bin")
    assert folder_fingerprint(tmp_path, ["*.bin"]) != first
    # sha256 of the two bytes, by hand
    assert file_fingerprint(tmp_path / "c.bin") == "b413f47d13ee2fe6"


@given(st.dictionaries(st.text("ab", min_size=1), st.dictionaries(st.text("cd", min_size=1), st.integers())))
def test_flat(value: dict[str, dict[str, int]]) -> None:
    expected = {f"{a}.{b}": n for a, inner in value.items() for b, n in inner.items()}
    assert flat(value) == expected | {a: {} for a, inner in value.items() if not inner}


# ---------------------------------------------------------------- whole or absent


def test_json_comes_back_and_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": [1, 2.5, None], "b": "ü"})
    assert read_json(path) == {"a": [1, 2.5, None], "b": "ü"}
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError):
            write_json(path, {"a": bad})
    assert read_json(path) == {"a": [1, 2.5, None], "b": "ü"}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_table_has_the_columns_of_all_rows(tmp_path: Path) -> None:
    write_table([{"a": 1}, {"a": 2, "label": "chosen"}], tmp_path / "t.parquet")
    expected = [{"a": 1, "label": None}, {"a": 2, "label": "chosen"}]
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == expected


@pytest.mark.parametrize("content", [b"{", b"", b'{"a": "\xff"}'])
def test_damaged_json_says_where_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StoreError, match="damaged") as caught:
        read_json(tmp_path / "x.json")
    assert caught.value.where == str(tmp_path / "x.json") and caught.value.fix


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_copy_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("new")
    target.write_text("old")

    def broken(source: Path, target: Path) -> None:
        target.write_text("ne")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", broken)
        with pytest.raises(OSError, match="No space"):
            copy_whole(source, target)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    copy_whole(source, target)
    assert target.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


WRITER = """
import sys
from pathlib import Path
from toolkit.files import write_json
path = Path(sys.argv[1])
n = 0
while True:
    n += 1
    write_json(path, {"n": n, "filling": "x" * 200_000, "again": n})
    if n == 1:
        print("started", flush=True)
"""


def test_a_kill_in_the_middle_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "started\n"
        time.sleep(0.1)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()  # type: ignore[union-attr]
    value = read_json(path)
    assert value["n"] == value["again"] >= 1 and len(value["filling"]) == 200_000


# ---------------------------------------------------------------- states


def test_the_life_of_a_stage(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    assert run.state("sft", "k1", FIELDS) == StageState("sft", "k1", "missing")
    run.work_dir("sft", "k1").mkdir(parents=True)
    assert run.state("sft", "k1", FIELDS).status == "partial"
    finished(run, "sft", "k1", "first")
    assert run.state("sft", "k1", FIELDS) == StageState("sft", "k1", "cached")
    assert not run.work_dir("sft", "k1").exists()
    record = run.record("sft")
    assert record is not None
    assert (record["stage"], record["key"], record["schema_version"]) == ("sft", "k1", SCHEMA_VERSION)

    other = {"sft": {"learning_rate": 2e-4, "epochs": 1}, "data": "abc", "new": 3}
    state = run.state("sft", "k2", other)
    assert (state.status, state.changed) == ("stale", ("new", "sft.learning_rate"))
    run.work_dir("sft", "k2").mkdir()
    assert run.state("sft", "k2", other).status == "partial"
    finished(run, "sft", "k2", "second", other)
    assert result(run, "sft") == "second"
    assert run.state("sft", "k2", other).status == "cached"
    state = run.state("sft", "k1", FIELDS)
    assert (state.status, state.changed) == ("shelved", ("new", "sft.learning_rate"))

    run.unshelve("sft", "k1")
    assert result(run, "sft") == "first"
    assert run.state("sft", "k1", FIELDS).status == "cached"
    assert run.state("sft", "k2", other).status == "shelved"
    run.unshelve("sft", "k2")
    assert result(run, "sft") == "second"


def test_a_record_that_is_damaged_is_no_finished_stage(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    finished(run, "sft", "k1")
    (run.stage_dir("sft") / STAGE_FILE).write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        run.state("sft", "k1", FIELDS)


def test_finishing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last rename fails, the work is still there and so is what it would have replaced."""
    run = RunFolder(tmp_path)
    finished(run, "sft", "k1", "first")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if ".work" in str(source):
            raise OSError(5, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OSError):
            finished(run, "sft", "k2", "second")
    assert run.state("sft", "k1", FIELDS).status == "shelved"
    assert run.state("sft", "k2", FIELDS).status == "partial"
    run.finish("sft", "k2", {"fields": FIELDS})
    assert result(run, "sft") == "second"
    run.unshelve("sft", "k1")
    assert result(run, "sft") == "first"


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    foreign = run.stage_dir("sft")
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert run.state("sft", "k1", FIELDS).status == "missing"
    for act in (lambda: finished(run, "sft", "k1"), lambda: run.shelve("sft")):
        with pytest.raises(StoreError, match="did not finish") as caught:
            act()
        assert caught.value.where == str(foreign) and "--out" in caught.value.fix
    assert (foreign / "thesis.txt").read_text() == "years of work"
    assert run.state("sft", "k1", FIELDS).status == "partial"  # and ours is not lost either


def test_shelving_nothing_is_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    run.shelve("sft")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".work"]


def test_equal_stages_of_other_runs_are_adopted(tmp_path: Path) -> None:
    here, there = RunFolder(tmp_path / "here"), RunFolder(tmp_path / "there")
    finished(there, "sft", "k1", "first")
    (there.stage_dir("sft") / "model").mkdir()
    (there.stage_dir("sft") / "model" / "weights").write_bytes(b"123")
    finished(there, "sft", "k2", "second")  # k1 is on the shelf now
    finished(here, "sft", "k0", "before")
    assert not here.adopt("sft", "k3", [there.root])
    assert result(here, "sft") == "before"

    assert here.adopt("sft", "k2", [tmp_path / "absent", there.root])
    assert result(here, "sft") == "second"
    assert here.adopt("sft", "k1", [there.root])
    assert result(here, "sft") == "first"
    assert (here.stage_dir("sft") / "model" / "weights").read_bytes() == b"123"
    assert [here.state("sft", k, FIELDS).status for k in ("k0", "k1", "k2")] == ["shelved", "cached", "shelved"]
    # The giver has what it had, and what the taker writes anew does not reach it.
    assert result(there, "sft") == "second"
    write_json(here.stage_dir("sft") / STAGE_FILE, {"key": "other", "fields": {}})
    assert read_json(there.shelf_dir("sft", "k1") / STAGE_FILE)["key"] == "k1"


def test_adoption_copies_where_links_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = RunFolder(tmp_path / "here"), RunFolder(tmp_path / "there")
    finished(there, "sft", "k1", "first")
    here.create()

    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    assert here.adopt("sft", "k1", [there.root])
    assert result(here, "sft") == "first"
    assert (here.stage_dir("sft") / "result.txt").stat().st_nlink == 1


def test_an_interrupted_adoption_is_begun_again(tmp_path: Path) -> None:
    here, there = RunFolder(tmp_path / "here"), RunFolder(tmp_path / "there")
    finished(there, "sft", "k1", "first")
    here.create()
    here.work_dir("sft", "k1").mkdir(parents=True)
    (here.work_dir("sft", "k1") / "half").write_text("a half")
    assert here.adopt("sft", "k1", [there.root])
    assert sorted(p.name for p in here.stage_dir("sft").iterdir()) == ["result.txt", STAGE_FILE]


# ---------------------------------------------------------------- the lock

HOLDER = """
import sys
from pathlib import Path
from toolkit.runs.store import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="another process") as caught, run.lock():
            pass
        assert caught.value.where == str(run.root) and caught.value.fix
    finally:
        holder.kill()
        holder.communicate()
    with run.lock():  # a process that was killed holds nothing
        assert (run.root / ".work").is_dir()
    with run.lock():
        pass


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made") as caught:
        RunFolder(tmp_path / "file" / "run").create()
    assert "--out" in caught.value.fix
