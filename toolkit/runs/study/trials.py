"""The trials of a study: an arm with a drawn setting and a seed, each a recipe of its own in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.errors import RecipeError
from toolkit.evals.verdict import ARMS
from toolkit.recipe.files import LoadedRecipe
from toolkit.recipe.schema import StudySection
from toolkit.recipe.study_conflicts import full_name, labels_of
from toolkit.recipe.yaml_values import one_line
from toolkit.runs.precision import load_for_run
from toolkit.runs.study.space import draw_settings

# The section of an arm's settings, which is the stage that trains its policy.
STAGE_OF_ARM = {"rm_ppo": "ppo", "dpo": "dpo"}
SFT = "sft"
OWN_REWARD_MODEL = "rm"  # as a judge: the reward model of the seed
# Controls: the arm whose chosen setting they take, and what they change.
PARENTS = {
    "rloo": "rm_ppo",
    "online_dpo": "dpo",
    "online_dpo_gold": "dpo",
    "length_only": "rm_ppo",
    "more_prompts": "rm_ppo",
}
LEAST_SAMPLES = 2  # of a prompt: what a leave-one-out baseline needs


@dataclass(frozen=True)
class Trial:
    """One training of an arm or a control. ``setting`` is its name in the tables, equal for all seeds."""

    arm: str
    number: int  # of the setting in its arm, from 1
    setting: str
    values: Mapping[str, Any]
    loaded: LoadedRecipe
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int:
        return self.loaded.recipe.seed

    @property
    def stage(self) -> str:
        """The last stage: the one that trains the policy."""
        if self.arm == SFT:
            return SFT
        return STAGE_OF_ARM[PARENTS.get(self.arm, self.arm)]

    @property
    def targets(self) -> tuple[str, ...]:
        """The stages to run, with all that they read. The SFT trial has the reward model that scores all policies."""
        if self.arm == SFT and OWN_REWARD_MODEL in self.loaded.recipe.evaluate.judges:
            return (SFT, "reward_model")
        return (self.stage,)

    @property
    def label(self) -> str:
        """The trial for people, as in ``rm_ppo (kl_coef=0.05), seed 1``."""
        return f"{self.arm}, seed {self.seed}" if self.arm == SFT else f"{self.arm} ({self.setting}), seed {self.seed}"

    @property
    def n_checkpoints(self) -> int:
        """How many policies along training are compared."""
        return 1 if self.arm == SFT else int(getattr(self.loaded.recipe, self.stage).num_checkpoints)


@dataclass(frozen=True)
class StudyPlan:
    """A recipe with settings from the command line, and the folder of the study."""

    recipe: str
    sets: tuple[str, ...]
    out: Path

    @cached_property
    def base(self) -> LoadedRecipe:
        """The recipe itself. Raises RecipeError where it is invalid, or has no section ``study``."""
        loaded = load_for_run(self.recipe, self.sets)
        if loaded.recipe.study is None:
            fix = "`duel recipes show study` has one to start from, or run the recipe as it is with `duel run`"
            raise RecipeError(
                f"the recipe {loaded.recipe.name} has no section `study`", where=str(loaded.path), fix=fix
            )
        return loaded

    @property
    def section(self) -> StudySection:
        section = self.base.recipe.study
        assert section is not None
        return section

    @property
    def seeds(self) -> range:
        first = self.base.recipe.seed
        return range(first, first + self.section.seeds)

    def trials(self) -> list[Trial]:
        """The trials of both arms: every setting with every seed. Raises RecipeError where one is no valid recipe."""
        return [trial for arm in ARMS for trial in self._of_arm(arm)]

    def _of_arm(self, arm: str) -> Iterator[Trial]:
        section = STAGE_OF_ARM[arm]
        space = getattr(self.section, section)
        drawn = draw_settings(space, self.section.trials, self.base.recipe.seed, where=f"study.{section}")
        for number, values in enumerate(drawn, start=1):
            named = {full_name(section, name): value for name, value in values.items()}
            yield from self._with_seeds(arm, number, described(values), named)

    def sft_trials(self) -> list[Trial]:
        """The SFT policy of every seed, from which both arms start. A control of the setting of the recipe."""
        return list(self._with_seeds(SFT, 1, SFT, {}))

    def control_trials(self, chosen: Mapping[str, Trial], length: float | None = None) -> list[Trial]:
        """The controls of the recipe with every seed. ``chosen`` has a trial of each arm's chosen setting.

        ``length`` is the mean number of tokens that RM + PPO's chosen policy writes, which length_only aims at.
        """
        trials: list[Trial] = []
        for control in self.section.controls:
            parent = chosen[PARENTS[control]]
            stage = STAGE_OF_ARM[PARENTS[control]]
            values = {name if "." in name else f"{stage}.{name}": value for name, value in parent.values.items()}
            values |= self._changes(control, parent, length)
            trials += self._with_seeds(control, 1, parent.setting, values)
        return trials

    def _changes(self, control: str, parent: Trial, length: float | None) -> dict[str, Any]:
        """What a control changes in its parent's recipe."""
        if control == "rloo":
            n = max(LEAST_SAMPLES, parent.loaded.recipe.ppo.samples_per_prompt)
            return {"ppo.advantage": "rloo", "ppo.samples_per_prompt": n}
        if control == "length_only":
            return {"ppo.reward": "length", "ppo.target_length": None if length is None else max(1, round(length))}
        if control == "more_prompts":
            return {"ppo.prompts": self.section.more_prompts}
        labels = "rm" if control == "online_dpo" else labels_of(self.base.recipe)
        return {"dpo.online": {"labels": labels}}

    def _with_seeds(self, arm: str, number: int, setting: str, values: Mapping[str, Any]) -> Iterator[Trial]:
        budget = self._budget(STAGE_OF_ARM[PARENTS.get(arm, arm)]) if arm != SFT else {}
        for seed in self.seeds:
            fixed = {"seed": seed, "data.split_seed": self.base.recipe.data_seed, "study": None}
            changes = [f"{name}={one_line(value)}" for name, value in {**budget, **values, **fixed}.items()]
            try:
                loaded = load_for_run(self.recipe, [*self.sets, *changes])
            except RecipeError as error:
                raise RecipeError(error.what, where=f"{arm}, {setting}: {error.where}", fix=error.fix) from error
            name = f"{arm}-{number}-seed{seed}" if arm != SFT else f"{arm}-seed{seed}"
            yield Trial(arm, number, setting, dict(values), loaded, self.out / "trials" / name)

    def _budget(self, section: str) -> dict[str, Any]:
        budget = self.section.budget
        if budget.tokens is not None:
            return {f"{section}.train_tokens": budget.tokens}
        return {f"{section}.train_seconds": budget.seconds} if budget.seconds is not None else {}


def described(values: Mapping[str, Any]) -> str:
    """A setting's name in the tables.

    >>> described({"kl_coef": 0.05, "learning_rate": 0.0001})
    'kl_coef=0.05 learning_rate=0.0001'
    """
    return " ".join(f"{name}={one_line(value)}" for name, value in values.items()) or "as in the recipe"
