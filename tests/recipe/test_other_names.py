"""Names of TRL's and OpenRLHF's settings get a message with duel's own, in recipes, ``--set`` and Python."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.ppo import PPOConfig, PPOTrainer
from toolkit.recipe.files import load_recipe
from toolkit.recipe.other_names import OTHER_NAMES
from toolkit.recipe.reference import reference

IN_RECIPES = {
    "ppo.ref_model": "the reference is the policy that training starts from",
    "ppo.init_kl_coef": "'kl_coef'",
    "ppo.local_rollout_forward_batch_size": "evaluate.token_budget",
    "ppo.stop_token": "the end of text of tokenizer and model",
    "ppo.num_sample_generations": "ppo.num_checkpoints",
    "ppo.max_new_tokens": "'response_length'",
    "ppo.actor_learning_rate": "ppo.learning_rate",
    "ppo.eps_clip": "ppo.cliprange",
    "ppo.n_samples_per_prompt": "ppo.samples_per_prompt",
    "pretrain": "model.name",
    "reward_pretrain": "reward_model.base",
    "data.prompt_max_len": "data.max_prompt_tokens",
    "data.chosen_key": "data.columns",
    "exp_name": "name",
}


@pytest.mark.parametrize("setting", IN_RECIPES)
def test_other_names_in_recipes_and_in_set(setting: str, tmp_path: Path) -> None:
    section, _, key = setting.rpartition(".")
    path = tmp_path / "recipe.yaml"
    shipped = load_recipe("smoke").path.read_text(encoding="utf-8")
    if section:
        assert f"\n{section}:\n" in shipped
        path.write_text(shipped.replace(f"\n{section}:\n", f"\n{section}:\n  {key}: 1\n"))
    else:
        path.write_text(f"{shipped}\n{key}: 1\n")
    for name, sets in ((str(path), []), ("smoke", [f"{setting}=1"])):
        with pytest.raises(RecipeError) as caught:
            load_recipe(name, sets)
        assert f"unknown key {setting}" in caught.value.what and IN_RECIPES[setting] in caught.value.fix


def test_every_entry_names_what_there_is() -> None:
    settings = {row.name for row in reference()}
    keys = {part for name in settings for part in name.split(".")}
    arguments = {field.name for field in dataclasses.fields(PPOConfig)}
    for word, other in OTHER_NAMES.items():
        if other.setting:
            known = settings if "." in other.setting else keys
            assert other.setting in known or any(name.startswith(f"{other.setting}.") for name in known), word
        assert other.in_recipe() or other.in_python(), word
        if other.setting and other.elsewhere and not other.python:
            assert other.setting.rpartition(".")[2] in arguments | {"columns"}, word


def test_the_page_on_ppo_names_the_same() -> None:
    """Old names in docs/ppo.md's tables whose new name differs are in the table."""
    page = (Path(__file__).parents[2] / "docs" / "ppo.md").read_text(encoding="utf-8")
    section = page[page.index("## From TRL's PPOTrainer") : page.index("And the log:")]
    arguments = {field.name for field in dataclasses.fields(PPOConfig)}
    same = {"args", "model", "train_dataset", "eval_dataset", "processing_class", "value_model", "peft_config"}
    same |= {"callbacks"}
    computed = {"world_size", "micro_batch_size", "num_total_batches", "dataset_num_proc"}  # that nobody sets
    for line in section.splitlines():
        if line.startswith("| `"):
            for name in re.findall(r"`(\w+)`", line.split(" | ")[0]):
                known = name in arguments | {
                    "value_model",
                    "model",
                    "train_dataset",
                    "eval_dataset",
                    "processing_class",
                }
                assert known or name in OTHER_NAMES or name in (*computed, "args", "peft_config", "callbacks"), name


def test_other_names_in_python(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        PPOConfig(
            output_dir=str(tmp_path), num_sample_generations=10, local_rollout_forward_batch_size=64, stop_token="eos"
        )  # type: ignore[call-arg]
    fix = caught.value.fix
    assert "num_sample_generations: it is log_completions_steps here" in fix
    assert (
        "local_rollout_forward_batch_size: it is token_budget here" in fix and "stop_token: it is stop_token_ids" in fix
    )
    with pytest.raises(RecipeError, match="no ref_model and no reward_model") as caught:
        PPOTrainer(args=None, model=None, ref_model=None, reward_model=None, train_dataset=None)  # type: ignore[call-arg]
    assert "PPOTrainer(reference=...)" in caught.value.fix and "PPOTrainer(reward=...)" in caught.value.fix
    with pytest.raises(RecipeError, match="no eps_clip") as caught:
        PPOConfig(output_dir=str(tmp_path), eps_clip=0.1)  # type: ignore[call-arg]
    assert "cliprange" in caught.value.fix
    with pytest.raises(TypeError, match="colour"):
        PPOConfig(output_dir=str(tmp_path), colour=1)  # type: ignore[call-arg]
    assert PPOConfig(output_dir=str(tmp_path), report_to="none", kl_coef=0.3).kl_coef == 0.3
