"""Folders of different kinds: none takes the place of another, nor of a user's own files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.begun_study import write_begun_study
from support.run_folder import write_run
from support.running import SMALL, duel
from support.study_documents import CASES
from support.study_tables import study_rows, write_study

from toolkit.cli.next_steps import next_study
from toolkit.errors import StoreError
from toolkit.files import write_json
from toolkit.models.resolve import resolve
from toolkit.recipe.files import load_recipe
from toolkit.runs.kinds import RUN_FILES, STUDY_FILES, kind_of, refuse_others_folder
from toolkit.runs.store import RunFolder

pytestmark = pytest.mark.e2e


def recorded_study(folder: Path) -> None:
    write_json(folder / "study.json", CASES["one seed"]())


def sweep(folder: Path) -> None:
    write_json(folder / "sweep.json", {"recipe": "smoke", "runs": []})


def card(folder: Path) -> None:
    duel("rm-card", "gold", "--data", "reviews", "--limit", "4", "--out", str(folder))


def comparison(folder: Path) -> None:
    judge = ["--judge", "gold", "--data", "reviews", "--limit", "2", "--max-new-tokens", "2"]
    duel("compare", "tiny", str(resolve("tiny").path), *judge, "--out", str(folder))


FOLDERS: dict[str, Callable[[Path], object]] = {
    "run": write_run,
    "study": write_begun_study,
    "study of a table": recorded_study,
    "sweep": sweep,
    "card": card,
    "comparison": comparison,
}
COMMANDS = {
    "run": ["run", "smoke", *SMALL],
    "run, dry": ["run", "smoke", *SMALL, "--dry-run"],
    "study": ["study", "study-tiny"],
    "study, dry": ["study", "study-tiny", "--dry-run"],
    "study of a table": ["study", "--table", "TABLE", "--force"],
    "sweep": ["sweep", "smoke", "--grid", "dpo.beta=0.1", *SMALL],
    "card": ["rm-card", "gold", "--data", "reviews", "--limit", "4", "--force"],
    "comparison": ["compare", "tiny", "TINY", "--judge", "gold", "--data", "reviews", "--limit", "2"],
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    for name, make in FOLDERS.items():
        make(root / name)
    return {name: root / name for name in FOLDERS}


def test_each_folder_knows_its_kind(made: dict[str, Path], small_run: Path, tmp_path: Path) -> None:
    assert {name: kind_of(folder) for name, folder in made.items()} == {name: name for name in FOLDERS}
    assert kind_of(small_run) == "run" and kind_of(tmp_path) is kind_of(tmp_path / "absent") is None
    copy = shutil.copytree(small_run, tmp_path / "copy")
    (copy / "manifest.json").unlink()  # moved away, since it was damaged
    assert kind_of(copy) == "run"
    for name, file, place in (("study", "trials.json", "trials/dpo-1-seed0"), ("sweep", "sweep.json", "seed=0")):
        shutil.copytree(copy, tmp_path / name / place)
        (tmp_path / name / file).write_text("{")
        assert kind_of(tmp_path / name) == name


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_the_folder_of_another_kind(made: dict[str, Path], command: str, tmp_path: Path) -> None:
    own = command.partition(",")[0]
    words = {"TABLE": str(tmp_path / "t.parquet"), "TINY": str(resolve("tiny").path)}
    write_study(list(study_rows()), tmp_path / "t.parquet")
    for there, folder in made.items():
        if there == own:
            continue
        before = files(folder)
        refused = duel(*(words.get(word, word) for word in COMMANDS[command]), "--out", str(folder), check=2)
        assert f"this folder holds a {there}: a {own} needs a folder of its own" in refused.stderr
        assert f"{folder}-{own.split()[0]}" in "".join(refused.stderr.split("fix:")[1].split("'"))
        assert files(folder) == before


def test_the_study_that_a_run_names_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("study-tiny", ["name=mine"]).recipe
    sets = ["name=mine", "data.train_prompts=24"]
    given = "duel study mine.yaml --set name=mine --set data.train_prompts=24"
    assert next_study("mine.yaml", recipe, True, sets)[1] == given
    write_run(Path("runs/mine"))
    assert next_study("mine.yaml", recipe, True, sets)[1] == f"{given} --out runs/mine-study"
    refuse_others_folder(Path("runs/mine-study"), "study", STUDY_FILES)
    write_begun_study(Path("runs/mine-study"))
    refuse_others_folder(Path("runs/mine-study"), "study", STUDY_FILES)  # it goes on


@pytest.mark.parametrize("name", ["report.html", "table.parquet", "trials.json", "study.json", "recipe.resolved.yaml"])
def test_a_study_replaces_no_file_of_the_user(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"trials": 100, "best": 0.7}')
    refused = duel("study", "study-tiny", "--out", str(tmp_path), check=2)
    assert "duel did not write it" in refused.stderr and name in refused.stderr and "--out" in refused.stderr
    assert files(tmp_path) == {name: b'{"trials": 100, "best": 0.7}'}


def test_a_report_replaces_no_file_of_the_user(tmp_path: Path) -> None:
    recorded_study(tmp_path)
    (tmp_path / "report.html").write_text("<h1>mine</h1>")
    refused = duel("report", str(tmp_path), check=2)
    assert "report.html" in refused.stderr and (tmp_path / "report.html").read_text() == "<h1>mine</h1>"
    duel("report", str(tmp_path), "--force")
    duel("report", str(tmp_path))  # its own


def test_a_sweep_replaces_no_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"method": "grid"}')
    refused = duel("sweep", "smoke", "--grid", "dpo.beta=0.1", "--out", str(tmp_path), check=2)
    assert "sweep.json" in refused.stderr and [*files(tmp_path)] == ["sweep.json"]


def test_a_card_replaces_no_table_of_scores(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "scores.parquet").write_text("of duel score")
    words = ["rm-card", "gold", "--data", "reviews", "--limit", "4", "--out", str(results)]
    for _ in range(2):
        refused = duel(*words, check=2)
        assert "scores.parquet" in refused.stderr and "give --force" in refused.stderr
        assert files(results) == {"scores.parquet": b"of duel score"}
    duel(*words, "--force")
    assert pq.read_table(results / "scores.parquet").num_rows == 24
    (results / "scores.parquet").unlink()
    duel(*words)  # as where it was stopped before it wrote the table
    assert pq.read_table(results / "scores.parquet").num_rows == 24


def test_the_judgements_of_a_run_are_not_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", n_prompts=4)
    before = files(run)
    words = ["judge", str(run), "--policy", "rm_ppo", "--baseline", "dpo", "--judge", "gold", "--limit", "2"]
    refused = duel(*words, "--out", str(run / "judgements.parquet"), check=2)
    assert "these are the judgements of a run" in refused.stderr and "--force" in refused.stderr
    assert files(run) == before
    for _ in range(2):  # the same command again goes on
        duel(*words, "--out", str(run / "gold.parquet"))


@pytest.mark.parametrize("kind", ["run", "study"])
def test_what_stopped_before_it_began_goes_on(kind: str, tmp_path: Path) -> None:
    """A killed command left its folder and its recipe, and no file that says more."""
    RunFolder(tmp_path).create()
    (tmp_path / "recipe.resolved.yaml").write_text("name: smoke")
    refuse_others_folder(tmp_path, kind, RUN_FILES if kind == "run" else STUDY_FILES)  # type: ignore[arg-type]
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(StoreError, match="duel did not write it"):
        refuse_others_folder(tmp_path, kind, RUN_FILES if kind == "run" else STUDY_FILES)  # type: ignore[arg-type]


def test_a_comparison_goes_on_without_its_samples(made: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made["comparison"], tmp_path / "c")
    for path in folder.glob("samples-*.parquet"):
        path.unlink()
    written = json.loads((folder / "results.json").read_text())
    comparison(folder)
    assert json.loads((folder / "results.json").read_text())["win_rates"] == written["win_rates"]


def test_a_run_that_shared_the_folder_of_a_study_goes_on(
    made: dict[str, Path], small_run: Path, tmp_path: Path
) -> None:
    """An earlier duel gave a run and a study of the same recipe one folder."""
    shared = shutil.copytree(small_run, tmp_path / "shared")
    shutil.copy(made["study"] / "trials.json", shared)
    assert kind_of(shared) == "study"
    refuse_others_folder(shared, "run", RUN_FILES)
    refuse_others_folder(shared, "study", STUDY_FILES)
    with pytest.raises(StoreError, match="holds a study"):
        refuse_others_folder(shared, "comparison", RUN_FILES)
