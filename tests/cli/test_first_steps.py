"""What a new user sees on the way to the first run: every line fits a terminal, and the next step is said."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.running import duel

from toolkit.models.remote_code import remote_code_allowed
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


def next_of(*command: str) -> str:
    """What stands behind "Next: ", which is the end of what a command prints."""
    said, _, following = duel(*command).stdout.partition("Next: ")
    assert said and following, command
    return following


def test_scores_lead_to_a_card_or_to_a_filter(small_run: Path, tmp_path: Path) -> None:
    """The commands run as they are printed, but for what the reader is to fill in."""
    rm, pairs = str(small_run / "reward_model" / "model"), str(small_run / "data" / "eval.parquet")
    scored = ("score", "--rm", rm, "--limit", "4")
    given = ("--max-prompt-tokens", "64", "--trust-remote-code")
    command, meaning = next_of(*scored, "--data", pairs, "--out", str(tmp_path / "s.parquet"), *given).splitlines()
    assert command.startswith(f"duel rm-card {rm} --data {pairs} ") and set(given) < set(command.split())
    assert "accuracy" in meaning and not remote_code_allowed()  # allowed to one command
    assert "accuracy" in duel(*command.split()[1:], "--limit", "4").stdout

    singles, out = tmp_path / "my answers.jsonl", tmp_path / "good.jsonl"
    singles.write_text('{"prompt": "The film was", "response": " good."}\n', encoding="utf-8")
    command, _ = next_of(*scored, "--data", str(singles), "--out", str(tmp_path / "t.parquet")).splitlines()
    words = shlex.split(command.replace("LABELS", pairs).replace("good.jsonl", str(out)))
    assert str(singles) in words
    done = duel(*words[1:]).stdout
    assert ("Next: read some rows of" in done) == ("dropped 0" not in done) and out.is_file()


def test_kept_pairs_lead_to_a_recipe(tmp_path: Path) -> None:
    gate = ("filter", "--judge", "gold", "--data", "reviews", "--calibrate", "reviews", "--fpr", "0.2")
    following = next_of(*gate, "--out", str(tmp_path / "good.jsonl.gz"))
    assert following.startswith("a recipe with data.source:") and str(tmp_path / "good.jsonl.gz") in following
    source = f"--set=data.source={tmp_path / 'good.jsonl.gz'}"
    assert "reward_model" in duel("run", "smoke", source, "--out", str(tmp_path / "run"), "--dry-run").stdout


def test_compared_policies_lead_to_win_rates(small_run: Path, tmp_path: Path) -> None:
    policies = (str(small_run / name / "model") for name in ("dpo", "sft"))
    shared = ("--data", "reviews", "--limit", "3", "--max-new-tokens", "2", "--judge", "gold")
    command = next_of("compare", *policies, *shared, "--out", str(tmp_path / "my policies"))
    assert "Win rates" in duel(*shlex.split(command)[1:]).stdout


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
