"""Every shipped recipe parses, passes the checks, says what it is for, and survives the way back to YAML."""

from __future__ import annotations

import re

import pytest

from toolkit.recipe.checks import check
from toolkit.recipe.files import load_recipe, resolved_yaml, shipped_recipes

pytestmark = pytest.mark.e2e

RECIPES = sorted(shipped_recipes())
EXPECTED = {"smoke", "quickstart", "hh-harmless", "ultrafeedback", "tldr", "imdb-sentiment", "rounds"}


def test_the_promised_recipes_are_there():
    assert set(RECIPES) >= EXPECTED


@pytest.mark.parametrize("name", RECIPES)
def test_parses_checks_and_round_trips(name, tmp_path):
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    check(loaded.recipe, loaded.origins)
    path = tmp_path / "recipe.resolved.yaml"
    path.write_text(resolved_yaml(loaded), encoding="utf-8")
    assert load_recipe(str(path)).recipe == loaded.recipe


@pytest.mark.parametrize("name", RECIPES)
def test_says_what_it_is_for_and_its_size(name):
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[: lines.index(f"name: {name}")] if line.startswith("# ")]
    assert len(head) >= 3 and any(line.startswith("# Size: ") for line in head)
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("name", RECIPES)
def test_every_published_value_names_its_source(name):
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    heads = re.findall(r"arXiv \d{4}\.\d{5}", text)
    published = re.findall(r"^ +[^#\n]*#.*(published[^:(\n]*: .*)$", text, re.MULTILINE)
    assert all("(" in line for line in published), "a published value without its source"
    assert heads and len(published) >= 3


@pytest.mark.parametrize("name", RECIPES)
def test_runs_offline_on_a_file_with_the_tiny_model(name):
    """What a user without a network does with any recipe: both replacements leave a recipe that passes the checks."""
    loaded = load_recipe(name, ["data.source=pairs.jsonl.gz", "model=tiny"])
    assert (loaded.recipe.model.name, loaded.recipe.data.source) == ("tiny", "pairs.jsonl.gz")
    assert 0 < loaded.recipe.data.eval_fraction < 1
