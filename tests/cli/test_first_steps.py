"""What a new user sees on the way to the first run: every line fits a terminal, and the next step is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.running import duel

from toolkit.recipe.files import shipped_recipes, summary_of

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", shipped_recipes())
def test_validate_fits_the_terminal_and_says_what_comes_next(name: str) -> None:
    lines = duel("validate", name, "--set", "seed=3").stdout.splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].startswith(f"{name}: valid")
    assert lines[-1] == f"Next: duel run {name} --set seed=3 --dry-run"


def test_the_list_of_recipes_has_whole_sentences() -> None:
    lines = duel("recipes", "list").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    summaries = {name: summary_of(path) for name, path in shipped_recipes().items()}
    assert all(text.endswith(".") for text in summaries.values())
    assert summaries["hh-harmless"].endswith("real annotators, no gold reward.")
    assert "its verdict to mean anything" in summaries["smoke"]


def test_a_copied_recipe_and_checked_data_lead_on(tmp_path: Path) -> None:
    copied = duel("recipes", "copy", "smoke", str(tmp_path / "my own.yaml")).stdout
    assert copied.splitlines()[-1] == f"Next: edit it, then duel validate '{tmp_path / 'my own.yaml'}'"
    row = {"prompt": "Name a bird.", "chosen": "The wren.", "rejected": "No."}
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert "Next: a recipe with data.source" in duel("check", str(data), "--model", "tiny").stdout
    data.write_text(json.dumps(row | {"chosen": 3}) + "\n", encoding="utf-8")
    assert "Next" not in duel("check", str(data), "--model", "tiny", check=2).stdout


def test_the_libraries_of_a_command_show_no_bars() -> None:
    script = (
        "import runpy, sys; sys.argv = ['duel', 'check', 'reviews', '--model', 'tiny', '--limit', '2', '--json']\n"
        "try: runpy.run_module('toolkit.cli', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import datasets, transformers\n"
        "shown = transformers.utils.logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()\n"
        "print(shown, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "(False, False)"
