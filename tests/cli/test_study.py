"""``duel study --table``: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.running import duel
from support.study_tables import study_rows, write_study

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = list(study_rows(arms=("rm_ppo", "dpo", "length_only"), settings=8))
    for row in rows:
        row["setting"] += ", a long name of a setting"
        row["train_tokens"] *= 1e6
    both = [{**row, "judge": judge} for row in rows for judge in ("gold", "openai:gpt@https://api.example.com/v1")]
    return write_study(both, tmp_path_factory.mktemp("study") / "table.parquet")


def test_it_prints_tables_for_a_terminal(table: Path) -> None:
    done = duel("study", "--table", str(table))
    lines = done.stdout.splitlines()
    assert lines[0].startswith(("Undecided: ", "RM + PPO is better: ", "DPO is better: "))
    assert max(map(len, lines)) < 80
    for title in ("RM + PPO against DPO", "Chosen on dev prompts", "by judge", "best of n trials", "Against controls"):
        assert title in done.stdout
    assert "beside: PPO on length alone to RM + PPO" in done.stdout


def test_the_json_is_the_file(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "study"
    printed = json.loads(duel("study", "--table", str(table), "--out", str(out), "--json").stdout)
    assert json.loads((out / "study.json").read_text()) == printed
    assert list(printed)[:2] == ["schema_version", "recipe"]
    again = duel("study", "--table", str(table), "--out", str(out)).stdout
    assert again.endswith(f"written: {out / 'study.json'}\nNext: duel report {out}\n")
    changed = duel("study", "--table", str(table), "--out", str(out), "--kl-limit", "1.5", check=2)
    assert "--force" in changed.stderr
    assert json.loads((out / "study.json").read_text()) == printed
    duel("study", "--table", str(table), "--out", str(out), "--kl-limit", "1.5", "--force")


@pytest.mark.fault
def test_bad_input_ends_with_two(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("arm,setting\n")
    rows = list(study_rows())
    half = write_study([row for row in rows if row["split"] == "test"], tmp_path / "half.parquet")
    for path, said in (
        (tmp_path / "absent.parquet", "no such table"),
        (tmp_path / "text.parquet", "no Parquet file"),
        (half, "no dev rows"),
    ):
        done = duel("study", "--table", str(path), check=2)
        assert said in done.stderr and "fix:" in done.stderr and "Traceback" not in done.stderr
    assert "name a RECIPE with a section `study`, or a --table" in duel("study", check=2).stderr


@pytest.mark.fault
def test_the_recipe_is_read_with_its_settings(tmp_path: Path) -> None:
    """One that needs them is no wrong recipe; a study replaces nothing."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nmodel: tiny\ndpo: {loss_type: ipo, label_smoothing: 0.1}\n")
    done = duel("study", str(recipe), "--set", "dpo.label_smoothing=0", "--seeds", "2", check=2)
    assert "study" in done.stderr and "label_smoothing" not in done.stderr
    assert "--force is for a --table" in duel("study", "study-tiny", "--force", check=2).stderr
    twice = duel("study", "study-tiny", "--set", "study.kl_limit=3", "--kl-limit", "2", check=2).stderr
    assert "study.kl_limit is given twice, by --set and by --kl-limit" in " ".join(twice.split())


def test_report_writes_the_page_of_a_study(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pilot"
    duel("study", "--table", str(table), "--out", str(folder))
    done = duel("report", str(folder))
    assert Path(done.stdout.strip()) == folder / "report.html"
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>Study pilot: RM + PPO against DPO</title>" in html and 'id="needed"' in html
    duel("report", str(folder), "--out", str(tmp_path / "other.html"), "--title", "Mine")
    assert "<title>Mine</title>" in (tmp_path / "other.html").read_text(encoding="utf-8")
    for second in (folder, tmp_path):
        refused = duel("report", str(folder), str(second), check=2)
        said = " ".join(refused.stderr.split())
        assert f"where: {folder} fix: give it alone: a study has a page of its own" in said
