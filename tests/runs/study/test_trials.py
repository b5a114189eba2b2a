"""A study's trials: their recipes, their folders, and what a study cannot ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe.files import load_recipe
from toolkit.runs.study.training import heading
from toolkit.runs.study.trials import StudyPlan, Trial

OUT = Path("out")


def plan(*sets: str) -> StudyPlan:
    return StudyPlan("study-tiny", sets, OUT)


def chosen(trials: list[Trial]) -> dict[str, Trial]:
    return {arm: next(trial for trial in trials if trial.arm == arm) for arm in ("rm_ppo", "dpo")}


def test_both_arms_try_as_many_settings_with_the_same_seeds_prompts_and_budget() -> None:
    trials = plan("seed=7", "study.seeds=2").trials()
    assert len(trials) == len({trial.folder for trial in trials}) == 2 * 2 * 4
    for trial in trials:
        recipe = trial.loaded.recipe
        assert recipe.seed in (7, 8) and recipe.data_seed == 7 and recipe.study is None
        assert getattr(recipe, trial.stage).train_tokens == 80_000
        for name, value in trial.values.items():
            section, _, key = name.partition(".")
            assert getattr(getattr(recipe, section), key) == value
    settings = {(trial.arm, trial.setting) for trial in trials}
    assert len(settings) == 8 and {arm for arm, _ in settings} == {"rm_ppo", "dpo"}


def test_the_line_above_a_trial_says_which_it_is() -> None:
    study = plan("study.seeds=2", "study.controls=[rloo]")
    trials = study.trials()
    second = next(trial for trial in trials if (trial.arm, trial.number, trial.seed) == ("rm_ppo", 2, 1))
    assert heading(second, 4) == f"[rm_ppo 2/4, seed 1] {second.setting}"
    [control, _] = study.control_trials(chosen(trials))
    assert heading(control, 1) == f"[rloo, seed 0] {control.setting}"
    assert heading(study.sft_trials()[1], 1) == "[sft, seed 1]"


def test_controls_take_the_chosen_setting_and_change_one_thing() -> None:
    study = plan("study.controls=[rloo, online_dpo, length_only]", "ppo.samples_per_prompt=1")
    parents = chosen(study.trials())
    controls = {trial.arm: trial for trial in study.control_trials(parents)}
    assert controls.keys() == {"rloo", "online_dpo", "length_only"}
    rloo, ppo = controls["rloo"].loaded.recipe.ppo, parents["rm_ppo"].loaded.recipe.ppo
    assert (rloo.advantage, rloo.samples_per_prompt, rloo.kl_coef) == ("rloo", 2, ppo.kl_coef)
    assert controls["length_only"].loaded.recipe.ppo.reward == "length"
    online = controls["online_dpo"].loaded.recipe.dpo
    assert online.online is not None and online.online.labels == "rm"
    assert online.beta == parents["dpo"].loaded.recipe.dpo.beta


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["study.ppo.kl_coeff=[0.1]"], "ppo has no setting 'kl_coeff'"),
        (["study.dpo.beta=[0.1, -1]"], "dpo.beta cannot be -1"),
        (["study.dpo.beta=[0.1, 0.1]"], "has the value 0.1 twice"),
        (["study.dpo.beta=[]"], "the search space of dpo.beta is empty"),
        (["study.dpo={sft.learning_rate: [0.1]}"], "cannot have sft.learning_rate"),
        (["study.dpo.num_checkpoints=[1, 2]"], "does not search over num_checkpoints"),
        (["study.dpo.learning_rate={log_uniform: [0.1, 0.01]}"], "the range of dpo.learning_rate is empty"),
        (["study.dpo.learning_rate={log_uniform: [0, 0.01]}"], "has no logarithm"),
        (["study.dpo.learning_rate={normal: [0, 0.01]}"], "study.dpo must be"),
        (["study.budget.seconds=5"], "a budget has one unit"),
        (["evaluate.confidence=0.9"], "a study's intervals and tests are at 95%"),
        (["study.select_by=golf", "evaluate.judges=[gold]"], "which is not in evaluate.judges"),
        (["evaluate.judges=[rm]"], "none can decide"),
        (["evaluate.judges=[gold, implicit]"], "no single implicit reward"),
        (["study.more_prompts=null"], "needs a file"),
        (["study.controls=[rloo, rloo]"], "a control is there twice"),
        (["study.controls=[sft]"], "study.controls must be"),
        (["dpo.kl_milestones=[1]"], "not reached by every trial"),
        (["study.dev_fraction=1"], "study.dev_fraction must be"),
        (["study=null"], "has no section `study`"),
    ],
)
def test_what_a_study_cannot_ask_for_is_told_in_words(changes: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(*changes).trials()
    assert words in str(caught.value) and "fix:" in str(caught.value)


def test_the_space_of_ppo_may_have_settings_of_its_reward_model() -> None:
    trials = plan("study.ppo={reward_model.learning_rate: [0.001, 0.002], kl_coef: [0.1, 0.2]}").trials()
    assert {t.loaded.recipe.reward_model.learning_rate for t in trials if t.arm == "rm_ppo"} == {0.001, 0.002}


def test_a_recipe_without_a_study_runs_as_before() -> None:
    assert load_recipe("smoke").recipe.study is None
