"""Commands that write one file: an equal call of a finished one computes nothing, another one is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import StoreError
from toolkit.files import read_json, write_json
from toolkit.measure.once import once
from toolkit.progress import Reporter

QUIET = Reporter(quiet=True)


@dataclass(frozen=True)
class Options:
    limit: int | None = None
    judge: str = "rm:model"


class Command:
    """A command that writes what it read, and the number of its calls."""

    def __init__(self) -> None:
        self.calls = 0

        @once(lambda out: out.with_suffix(".rest"))
        def copy_file(data: str, options: Options, *, out: Path, reporter: Reporter) -> dict[str, Any]:
            self.calls += 1
            out.write_text(Path(data).read_text() + str(options))
            out.with_suffix(".rest").write_text("rest")
            return {"calls": self.calls, "nothing": None}

        self.copy_file = copy_file


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("{}")
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    return Command()


def test_an_equal_call_gives_what_the_first_one_gave(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    out, reporter = Path("out.txt"), Reporter()
    first = command.copy_file("data.jsonl", Options(), out=out, reporter=reporter)
    written = out.stat().st_mtime_ns
    assert (
        command.copy_file("data.jsonl", Options(), out=out, reporter=reporter) == first == {"calls": 1, "nothing": None}
    )
    assert command.calls == 1 and out.stat().st_mtime_ns == written
    assert "out.txt is done already, by the same command" in capsys.readouterr().err
    assert command.copy_file("data.jsonl", Options(), out=out, force=True, reporter=reporter)["calls"] == 2
    assert command.copy_file("data.jsonl", Options(), out=out, reporter=reporter)["calls"] == 2


def _other_data() -> None:
    Path("data.jsonl").write_text('{"prompt": 1}')


def _other_model() -> None:
    Path("model/config.json").write_text('{"hidden_size": 8}')


def _another_file_in_its_place() -> None:
    Path("out.txt").write_text("a thesis")


def _another_rest() -> None:
    Path("out.rest").write_text("a thesis")


def _no_record() -> None:
    Path(".out.txt.done.json").unlink()


@pytest.mark.parametrize(
    "change",
    [_other_data, _other_model, _another_file_in_its_place, _another_rest, _no_record],
    ids=lambda f: f.__name__,
)
def test_what_changed_since_is_refused(command: Command, change: Any) -> None:
    command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)
    change()
    with pytest.raises(StoreError, match="the file exists"):
        command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)
    assert command.calls == 1


@pytest.mark.parametrize(
    ("named", "file"),
    [("sets", "sets/data/train-0.jsonl"), ("~/sets", "sets/data/train-0.jsonl"), ("~/rows.jsonl", "rows.jsonl")],
)
def test_every_file_of_the_data_counts(
    command: Command, monkeypatch: pytest.MonkeyPatch, named: str, file: str
) -> None:
    """Also deep in a folder, as its loader reads them, but not in hidden folders; and below the home folder."""
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("sets/data").mkdir(parents=True)
    Path(file).write_text("{}")

    def call() -> int:
        options = Options(judge=f"file:{named}")
        return int(command.copy_file("data.jsonl", options, out=Path("out.txt"), reporter=QUIET)["calls"])

    assert call() == 1
    Path("sets/.cache").mkdir()
    Path("sets/.cache/lock").touch()
    assert call() == command.calls == 1
    Path(file).write_text('{"prompt": 1}')
    with pytest.raises(StoreError, match="the file exists"):
        call()


@pytest.mark.parametrize("options", [Options(limit=3), Options(judge="gold")])
def test_other_arguments_are_refused(command: Command, options: Options) -> None:
    command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)
    with pytest.raises(StoreError, match="the file exists"):
        command.copy_file("data.jsonl", options, out=Path("out.txt"), reporter=QUIET)


def test_a_file_of_its_own_that_stands_beside_is_not_overwritten(command: Command) -> None:
    Path("out.rest").write_text("a thesis")
    with pytest.raises(StoreError, match="the file exists") as caught:
        command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)
    assert "out.rest" in str(caught.value) and command.calls == 0


def test_a_removed_file_is_written_again(command: Command) -> None:
    command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)
    os.remove("out.txt")
    os.remove("out.rest")
    assert command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)["calls"] == 2


def test_a_removed_file_is_written_again_over_what_stood_beside(command: Command) -> None:
    command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)
    os.remove("out.txt")
    assert command.copy_file("data.jsonl", Options(limit=3), out=Path("out.txt"), reporter=QUIET)["calls"] == 2
    os.remove("out.txt")
    Path("out.rest").write_text("edited")
    with pytest.raises(StoreError, match="the file exists"):
        command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)


def test_an_interrupted_call_leaves_nothing_beside(tmp_path: Path) -> None:
    fails = True

    @once(lambda out: out.with_suffix(".rest"), lambda out: out.with_suffix(".optional"))
    def work(*, out: Path, reporter: Reporter) -> dict[str, Any]:
        out.with_suffix(".rest").write_text("rest")
        if fails:
            raise KeyboardInterrupt
        out.write_text("whole")
        return {}

    out = tmp_path / "out.txt"
    with pytest.raises(KeyboardInterrupt):
        work(out=out, reporter=QUIET)
    assert [*tmp_path.iterdir()] == []
    fails = False
    work(out=out, reporter=QUIET)
    work(out=out, reporter=QUIET)  # what it may write and did not is not missed
    assert out.read_text() == "whole" and not out.with_suffix(".optional").exists()
    (tmp_path / "other.optional").write_text("a thesis")
    with pytest.raises(StoreError, match="the file exists"):
        work(out=tmp_path / "other.txt", reporter=QUIET)


def test_the_record_of_an_earlier_version_counts(command: Command) -> None:
    """It has the hash of the file alone."""
    command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)
    record = read_json(Path(".out.txt.done.json"))
    write_json(Path(".out.txt.done.json"), record | {"files": record["files"][:1]})
    assert command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)["calls"] == 1


def test_of_launched_processes_the_others_give_nothing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET)
    monkeypatch.setenv("RANK", "1")
    assert command.copy_file("data.jsonl", Options(), out=Path("out.txt"), reporter=QUIET) == {}
    assert command.calls == 1


def test_arguments_that_cannot_be_compared_are_a_defect(command: Command) -> None:
    with pytest.raises(TypeError, match="object is no argument"):
        command.copy_file("data.jsonl", object(), out=Path("out.txt"), reporter=QUIET)
