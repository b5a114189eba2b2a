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
from toolkit.runs.facts import machine
from toolkit.runs.rerun import FORMS, compare_outputs, recipe_of
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


@pytest.mark.parametrize("changed", [*FORMS, "processes", "one stage", "one word"])
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

    assert compare_outputs(*sides({"a": "1"}, {"a": "1"})) == {"sft": {"equal": True, "files_that_differ": []}}
    assert compare_outputs(*sides({"a": "1"}, {"a": "2"})) == {"sft": {"equal": False, "files_that_differ": ["a"]}}
    assert compare_outputs(*sides({"a": "1"}, {"b": "1"}))["sft"]["files_that_differ"] == ["a", "b"]
    assert compare_outputs(*sides(None, {"a": "1"})) == {"sft": {"equal": None, "files_that_differ": []}}
    assert compare_outputs(*sides({}, {})) == {}


def test_the_facts_that_bits_depend_on() -> None:
    facts = compute()
    assert facts["device"] == "cpu" and facts["threads"] >= 1 and facts["cpu_kernels"]
    assert machine()["processor"] and isinstance(machine()["instructions"], list)
