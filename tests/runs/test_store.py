"""Run folders: files are whole or absent, finished stages are never lost, foreign folders never taken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.damage import DAMAGES, removed

from toolkit.errors import StoreError
from toolkit.files import (
    read_json,
    write_json,
)
from toolkit.runs import store
from toolkit.runs.store import SCHEMA_VERSION, STAGE_FILE, RunFolder, StageState
from toolkit.storage.integrity import refuse_changed

Damage = Callable[[Path], None]
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


def edited(path: Path) -> None:
    """Another value of the same size, in a file that keeps its time."""
    before = path.stat()
    content = path.read_text()
    path.write_text(content.replace("epochs", "epoche") if path.name == STAGE_FILE else content.swapcase())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and content != path.read_text()


@pytest.mark.parametrize("name", ["result.txt", "model/weights", STAGE_FILE])
@pytest.mark.parametrize("damage", [*DAMAGES, edited])
def test_a_damaged_stage_is_named_and_replaced(name: str, damage: Damage, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (run.work_dir("sft", "k1") / "model").mkdir(parents=True)
    (run.work_dir("sft", "k1") / "model" / "weights").write_text("weights")
    finished(run, "sft", "k1")
    (run.stage_dir("sft") / "model" / "notes.txt").write_text("the user's")
    assert run.state("sft", "k1", FIELDS).status == "cached"  # what the user adds is no damage
    damage(run.stage_dir("sft") / name)
    if (name, damage) == (STAGE_FILE, removed):
        with pytest.raises(StoreError, match="did not finish writing"):  # it may be anybody's
            run.refuse_foreign("sft")
        return
    state = run.state("sft", "k1", FIELDS)
    assert state.status == "damaged" and state.damage.startswith(name)
    with pytest.raises(StoreError, match=name if name != STAGE_FILE else "damaged") as caught:
        refuse_changed(run.stage_dir("sft") / name)
    assert f"duel run RECIPE --out {tmp_path}" in caught.value.fix
    other = RunFolder(tmp_path / "other")
    other.create()
    assert not other.adopt("sft", "k1", [run.root])

    finished(run, "sft", "k1", "again")
    assert run.state("sft", "k1", FIELDS).status == "cached" and result(run, "sft") == "again"
    aside = tmp_path / ".shelf" / "sft-damaged-1"
    assert (aside / name).is_file() == (damage is not removed)
    if name != STAGE_FILE:  # a record that cannot be read does not tell what is the user's
        assert (run.stage_dir("sft") / "model" / "notes.txt").read_text() == "the user's"


def test_a_stage_whose_input_was_computed_again_to_other_files_is_stale(tmp_path: Path) -> None:
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")

    def dpo(folder: RunFolder) -> None:
        folder.work_dir("dpo", "k2").mkdir(parents=True)
        folder.finish("dpo", "k2", {"fields": FIELDS}, ["sft"])

    finished(run, "sft", "k1", "first")
    dpo(run)
    assert run.state("dpo", "k2", FIELDS, run.digests(["sft"])).status == "cached"
    finished(run, "sft", "k1", "first")
    assert run.state("dpo", "k2", FIELDS, run.digests(["sft"])).status == "cached"
    finished(run, "sft", "k1", "other")
    assert run.state("dpo", "k2", FIELDS, run.digests(["sft"])) == StageState("dpo", "k2", "stale", ("input sft",))
    finished(other, "sft", "k1", "other")
    dpo(other)
    assert run.adopt("dpo", "k2", [other.root], ["sft"])
    assert run.state("dpo", "k2", FIELDS, run.digests(["sft"])).status == "cached"
    finished(run, "sft", "k1", "third")
    assert not run.adopt("dpo", "k2", [other.root], ["sft"])


def test_a_result_on_the_shelf_survives_one_with_its_key_that_read_other_inputs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def dpo(text: str) -> None:
        run.work_dir("dpo", "k2").mkdir(parents=True, exist_ok=True)
        (run.work_dir("dpo", "k2") / "result.txt").write_text(text)
        run.finish("dpo", "k2", {"fields": FIELDS}, ["sft"])

    finished(run, "sft", "k1", "first")
    dpo("of first")
    os.rename(run.stage_dir("dpo"), tmp_path / "right")
    finished(run, "sft", "k1", "other")
    dpo("of other")
    finished(run, "sft", "k1", "first")
    (tmp_path / ".shelf").mkdir(exist_ok=True)
    os.rename(tmp_path / "right", run.shelf_dir("dpo", "k2"))
    assert run.state("dpo", "k2", FIELDS, run.digests(["sft"])).status == "shelved"
    run.unshelve("dpo", "k2")
    assert result(run, "dpo") == "of first"
    assert run.state("dpo", "k2", FIELDS, run.digests(["sft"])).status == "cached"
    assert (run.shelf_dir("dpo", "k2") / "result.txt").read_text() == "of other"


@pytest.mark.parametrize("killed", ["listed", "write_sealed", "_put"])
def test_a_kill_behind_the_last_step_loses_nothing(
    killed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what the stage resumes from, nor a stage that has its record."""
    run = RunFolder(tmp_path)
    work = run.work_dir("sft", "k1")
    (work / "trainer" / "checkpoint-8").mkdir(parents=True)
    (work / "trainer" / "checkpoint-8" / "state").write_text("all steps")
    (work / "attempts.json").write_text('{"wall_s": 9.0}')

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run if killed == "_put" else store, killed, kill)
        with pytest.raises(KeyboardInterrupt):
            finished(run, "sft", "k1")
    assert (work / "trainer" / "checkpoint-8" / "state").is_file() and (work / "attempts.json").is_file()
    assert run.state("sft", "k1", FIELDS).status == "partial"
    if killed == "_put":
        assert run.take_finished("sft", "k1")
    else:
        assert not run.take_finished("sft", "k1")
        run.finish("sft", "k1", {"fields": FIELDS})
    assert run.state("sft", "k1", FIELDS).status == "cached" and not work.exists()
    assert sorted(path.name for path in run.stage_dir("sft").iterdir()) == ["result.txt", STAGE_FILE]
    record = run.record("sft")
    assert record is not None and list(record["files"]) == ["result.txt"]


def test_the_record_of_an_earlier_version_has_no_list_of_files(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    finished(run, "sft", "k1")
    record = run.record("sft")
    assert record is not None
    write_json(run.stage_dir("sft") / STAGE_FILE, {k: v for k, v in record.items() if k not in ("files", "inputs")})
    (run.stage_dir("sft") / "result.txt").write_text("edited")
    assert run.state("sft", "k1", FIELDS).status == "cached"


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
