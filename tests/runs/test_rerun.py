"""A run again from its manifest: the same weights and tables, and what differs is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.running import duel

from toolkit.cli.tables import rerun_tables
from toolkit.engine.facts import compute
from toolkit.errors import RecipeError
from toolkit.files import write_json
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.runs import rerun as rerunning
from toolkit.runs.facts import machine
from toolkit.runs.listing import compare_outputs
from toolkit.runs.pipeline import RunOptions, new_manifest
from toolkit.runs.plan import plan_stages
from toolkit.runs.rerun import FORMS, recipe_of
from toolkit.runs.store import RunFolder
from toolkit.storage.integrity import read_sealed, write_sealed


@pytest.mark.e2e
def test_a_manifest_alone_is_enough(small_run: Path, tmp_path: Path) -> None:
    """Without the run's folder. The manifest is made to come from another version, processor, code and threads."""
    manifest = read_sealed(small_run / "manifest.json")
    assert manifest["stages"]["sft"]["compute"]["attention"] == ["grouped"]
    assert manifest["stages"]["sft"]["compute"]["threads"] == 1
    manifest["versions"]["torch"] = "2.11.0"
    manifest["machine"]["processor"] = "another"
    manifest["stages"]["ppo"]["fields"]["code"] = "0"
    manifest["stages"]["ppo"]["compute"]["threads"] = 64
    manifest["stages"]["dpo"]["outputs"]["model/model.safetensors"] = "0"
    write_sealed(tmp_path / "manifest.json", manifest)
    out = tmp_path / "again"
    again = json.loads(duel("rerun", str(tmp_path / "manifest.json"), "--out", str(out), "--json").stdout)
    assert again["versions"] == {"torch": ["2.11.0", manifest["stages"]["sft"]["versions"]["torch"]]}
    assert again["machine"]["processor"][0] == "another" and again["inputs"] == {"ppo": ["code"]}
    assert again["compute"] == {"ppo": {"threads": [64, 1]}}
    unequal = {stage: entry["files_that_differ"] for stage, entry in again["stages"].items() if not entry["equal"]}
    assert unequal == {"dpo": ["model/model.safetensors"]} and again["equal"] is False
    assert set(again["stages"]) == {"data", "sft", "reward_model", "ppo", "dpo", "evaluate"}
    assert again["results"] == []  # the original's are not beside its manifest
    said = rerun_tables(again)
    assert "Not equal: dpo (model/model.safetensors)" in said and "ppo (code)" in said
    assert any(line.split() == ["threads", "64", "1"] for line in said.splitlines())

    refused = duel("rerun", str(out), "--out", str(out), check=2)
    assert "this is the original's folder" in refused.stderr and "--out" in refused.stderr


def test_bad_input_is_told_in_words(small_run: Path, tmp_path: Path) -> None:
    missing = duel("rerun", str(tmp_path / "no.json"), check=2).stderr
    assert "no.json" in missing and "manifest.json" in missing
    manifest = read_sealed(small_run / "manifest.json")
    manifest["recipe"]["ppo"]["gone"] = 1
    with pytest.raises(RecipeError, match=r"cannot run ppo\.gone") as caught:
        recipe_of(manifest, tmp_path)
    assert "rlhf-duel" in str(caught.value.fix)


@pytest.mark.parametrize("changed", [*FORMS, "processes", "launch", "one stage", "one word"])
def test_a_manifest_with_a_field_of_another_form_is_refused(changed: str, small_run: Path, tmp_path: Path) -> None:
    manifest = read_sealed(small_run / "manifest.json")
    if changed == "one stage":
        manifest["stages"]["sft"]["fields"] = []
    elif changed == "one word":
        manifest["command"] = [5]
    else:
        manifest[changed] = "two" if changed == "command" else [5]
    write_sealed(tmp_path / "copy.json", manifest)
    refused = duel("rerun", str(tmp_path / "copy.json"), "--out", str(tmp_path / "again"), check=2).stderr
    assert "copy.json" in refused and "of another form" in refused and not (tmp_path / "again").exists()


def test_stages_without_hashes_are_not_called_equal() -> None:
    def sides(*outputs: dict[str, str] | None) -> list[dict[str, dict[str, Any]]]:
        return [{"sft": {} if side is None else {"outputs": side}} for side in outputs]

    def entry(equal: bool | None, *names: str, missing_in: str | None = None) -> dict[str, Any]:
        return {"sft": {"equal": equal, "files_that_differ": list(names), "missing_in": missing_in}}

    assert compare_outputs(*sides({"a": "1"}, {"a": "1"})) == entry(True)
    assert compare_outputs(*sides({"a": "1"}, {"a": "2"})) == entry(False, "a")
    assert compare_outputs(*sides({"a": "1"}, {"b": "1"})) == entry(False, "a", "b")
    assert compare_outputs(*sides(None, {"a": "1"})) == compare_outputs(*sides(None, None)) == entry(None)
    assert compare_outputs(*sides({}, {})) == {}
    [one] = sides({"a": "1"})
    assert compare_outputs(one, {}) == entry(None, missing_in="second")
    assert compare_outputs({}, one) == entry(None, missing_in="first")


@pytest.mark.parametrize(
    ("finished", "asked"),
    [
        (["data", "sft", "dpo"], {"target": "dpo"}),  # a study's trial
        (["data", "sft", "reward_model", "ppo"], {"target": "ppo"}),
        (["data", "sft", "reward_model", "ppo", "dpo"], {"until": "dpo"}),
        (["data", "sft", "reward_model", "dpo"], {"until": "dpo"}),
        ([], {}),
    ],
)
def test_what_the_original_finished_is_run_again_as_it_was_launched(
    finished: list[str], asked: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the original is a rerun, whose command names a manifest alone."""
    loaded, launch = load_recipe("smoke"), ["--num_processes", "2"]
    stages = plan_stages(loaded, RunFolder(tmp_path / "first"), 2)
    manifest = new_manifest(loaded, stages, ["duel", "rerun", "runs/first"], 2, launch)
    records = {planned.spec.name: {"fields": planned.fields} for planned in stages if planned.spec.name in finished}
    write_json(tmp_path / "first" / "manifest.json", manifest | {"stages": records})
    taken: list[RunOptions] = []

    def run(*arguments: Any) -> dict[str, Any]:
        taken.append(arguments[-1])
        return manifest | {"stages": records}

    monkeypatch.setattr(rerunning, "run", run)
    rerunning.rerun(tmp_path / "first", tmp_path / "again", Reporter(quiet=True), RunOptions())
    [options] = taken
    assert {name: value for name in ("target", "until") if (value := getattr(options, name)) is not None} == asked
    assert options.launch == launch


def test_the_facts_that_bits_depend_on() -> None:
    facts = compute()
    assert facts["device"] == "cpu" and facts["threads"] >= 1 and facts["cpu_kernels"]
    assert machine()["processor"] and isinstance(machine()["instructions"], list)
