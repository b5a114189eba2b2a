"""``-q``, ``--debug`` and ``--json`` before and behind a command; what ``--until reward_model`` ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.running import SMALL, duel

pytestmark = pytest.mark.e2e


def test_json_before_and_behind_a_command() -> None:
    before, behind = duel("--json", "recipes", "list"), duel("recipes", "list", "--json")
    assert before.stdout == behind.stdout and {"name", "summary"} == json.loads(before.stdout)[0].keys()
    for words in (("--json", "recipes", "show", "smoke"), ("recipes", "show", "smoke", "--json")):
        assert "No such option '--json'" in duel(*words, check=2).stderr


def test_debug_and_quiet_before_and_behind_a_command(tmp_path: Path) -> None:
    for words in (("--debug", "validate", "nosuch"), ("validate", "nosuch", "--debug")):
        assert "Traceback" in duel(*words, check=2).stderr
    assert "Traceback" not in duel("validate", "nosuch", check=2).stderr
    command = ["simulate", "--data", "reviews", "--policy", "tiny", "--limit", "2", "--k", "2", "--max-new-tokens", "4"]
    for number, words in enumerate((["-q", *command], [*command, "-q"])):
        done = duel(*words, "--out", str(tmp_path / f"{number}.jsonl.gz"))
        assert done.stderr == "" and "Simulated labels" in done.stdout
    assert duel(*command, "--out", str(tmp_path / "0.jsonl.gz")).stderr  # says that it is there already


def test_a_run_until_the_reward_model_ends_with_its_accuracy(small_run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(small_run, tmp_path / "run")
    evaluated = json.loads((out / "results.json").read_text())["rm_quality"]["explicit"]
    command = ["run", "smoke", "--out", str(out), *SMALL, "--until", "reward_model"]
    document = json.loads(duel(*command, "--json").stdout)
    assert document["reward_model"]["accuracy"] == pytest.approx(evaluated["accuracy"]["value"])
    assert document["reward_model"]["n_comparisons"] == evaluated["n_pairs"]
    said = " ".join(duel(*command).stdout.split())
    assert said.startswith(f"The reward model is right in {evaluated['accuracy']['value']:.1%} of ")
