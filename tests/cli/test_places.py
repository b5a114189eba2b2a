"""``--out`` where no file or folder can be: refused before anything is computed, with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.run_folder import write_run
from support.running import SMALL, duel
from support.study_tables import study_rows, write_study

from toolkit.models.resolve import resolve

pytestmark = [pytest.mark.e2e, pytest.mark.fault]
# What does not exist would be told first, if the place were looked at later.
FILES = {
    "score": ["score", "--rm", "no-such-model", "--data", "reviews"],
    "rewards": ["rewards", "--policy", "no-such-model", "--reference", "no-such-model", "--data", "reviews"],
    "simulate": ["simulate", "--data", "reviews"],
    "label": ["label", "--judge", "gold", "--data", "reviews"],
    "filter": ["filter", "--judge", "gold", "--data", "absent.jsonl", "--calibrate", "absent.jsonl", "--fpr", "0.1"],
    "judge": ["judge", "RUN", "--policy", "rm_ppo", "--baseline", "dpo", "--judge", "gold"],
    "report": ["report", "RUN"],
}
FOLDERS = {
    "run": ["run", "smoke", *SMALL],
    "dry run": ["run", "smoke", *SMALL, "--dry-run"],
    "sweep": ["sweep", "smoke", "--grid", "dpo.beta=0.1", *SMALL],
    "study": ["study", "study-tiny"],
    "study of a table": ["study", "--table", "TABLE"],
    "compare": ["compare", "tiny", str(resolve("tiny").path), "--judge", "gold", "--data", "reviews", "--limit", "2"],
    "rm-card": ["rm-card", "gold", "--data", "reviews", "--limit", "4"],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "RUN", n_prompts=4)
    write_study(list(study_rows()), tmp_path / "TABLE")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.txt").write_text("mine")
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("command", [*FILES, *FOLDERS])
def test_nothing_is_below_a_file(place: Path, command: str) -> None:
    words, before = (FILES | FOLDERS)[command], listing(place)
    for out in ("notes.txt/x.jsonl", "notes.txt/sub/x.jsonl"):
        refused = duel(*words, "--out", out, cwd=place, check=2)
        assert "this is a file, and not a folder" in refused.stderr and "notes.txt" in refused.stderr
    assert listing(place) == before and (place / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_no_file_takes_the_place_of_a_folder(place: Path, command: str, force: list[str]) -> None:
    before = listing(place)
    for out in ("results", "."):
        refused = duel(*FILES[command], "--out", out, *force, cwd=place, check=2)
        assert "this is a folder, and not a file to write" in refused.stderr
    assert listing(place) == before


def test_a_name_that_no_disk_takes(place: Path) -> None:
    refused = duel(*FILES["simulate"], "--out", f"{'x' * 300}.jsonl.gz", cwd=place, check=2)
    assert "choose a shorter name" in refused.stderr


def test_pushing_below_or_onto_a_file(small_run: Path, place: Path) -> None:
    for to in ("notes.txt", "notes.txt/below"):
        assert "not a folder" in duel("push", str(small_run), "--to", to, cwd=place, check=2).stderr
    pushed = json.loads(duel("push", str(small_run), "--to", ".", "--only", "preferences", "--json", cwd=place).stdout)
    assert (place / "preferences" / "README.md").is_file() and list(pushed["pushed"]) == ["preferences"]
