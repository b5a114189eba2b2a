"""The recipe reference says all that the schema knows."""

from __future__ import annotations

from toolkit.recipe.reference import markdown, reference
from toolkit.recipe.schema import Recipe, flat


def test_every_setting_stands_in_it_with_a_meaning() -> None:
    found = {setting.name: setting for setting in reference()}
    everything = {"name": "x", "dpo": {"online": {}}, "rft": {}, "rounds": {}, "study": {}}
    assert set(flat(Recipe.model_validate(everything))) == set(found)
    assert [name for name, setting in found.items() if not setting.meaning] == []
    assert len(found) == len(reference())


def test_what_a_row_says() -> None:
    found = {setting.name: setting for setting in reference()}
    assert found["ppo.gamma"].allowed == "a number >= 0 and <= 1" and found["ppo.gamma"].default == "1.0"
    assert found["name"].default == "" and found["model.revision"].default == "null"
    assert found["report_to"].allowed == "a list of one of wandb, trackio, tensorboard"
    text = markdown()
    assert "| `dpo.beta` | a number > 0 | `0.1` |" in text
    tables = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(tables) == len(found) and all(line.replace("\\|", "").count("|") == 5 for line in tables)
