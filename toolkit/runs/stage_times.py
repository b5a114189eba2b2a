"""About how long the stages of a recipe take on this machine, by the response tokens that they train on, score and
sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from toolkit.models.encoding import TextEncoder
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.schedule import Schedule
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow
from toolkit.recipe.schema import EvaluateSection, Recipe
from toolkit.recipe.training import RewardModelSection, Training
from toolkit.runs.calibration import Passes, Speed


@dataclass(frozen=True)
class TrainingRows:
    """The rows that the stages train on, and their responses in tokens."""

    rows: Sequence[PreferenceRow]
    encoder: TextEncoder
    max_response_tokens: int

    @cached_property
    def lengths(self) -> list[list[int]]:
        """For each prompt, its responses' tokens."""
        limit = self.max_response_tokens
        return [[len(ids) for ids in self.encoder.responses(row.responses, limit)[0]] for row in self.rows]

    @cached_property
    def mean_length(self) -> float:
        return fmean(length for row in self.lengths for length in row)

    @cached_property
    def tokens(self) -> int:
        """Response tokens: one epoch of SFT."""
        return sum(map(sum, self.lengths))

    @cached_property
    def compared_tokens(self) -> int:
        """Response tokens of the prompts that have comparisons: one epoch of a reward model or DPO."""
        pairs = zip(self.rows, self.lengths, strict=True)
        return sum(sum(lengths) for row, lengths in pairs if splits.pairs(row))


def training_seconds(stage: str, recipe: Recipe, data: TrainingRows, speed: Speed) -> float:
    """The time of sft, reward_model, ppo or dpo. A budget in seconds is not looked at."""
    if stage == "sft":
        tokens = epochs(recipe.sft, len(data.rows)) * data.tokens
        return speed.load_s + tokens * speed.train_s if recipe.sft.enabled else 0.0
    if stage == "reward_model":
        tokens = reward_model_tokens(recipe, data)
        return models_to_train(recipe.reward_model) * speed.reward.load_s + tokens * speed.reward.train_s
    return (_ppo_seconds if stage == "ppo" else _dpo_seconds)(recipe, data, speed)


def epochs(section: Training, n_prompts: int) -> float:
    if section.max_steps > 0:
        return section.max_steps * section.per_device_train_batch_size / n_prompts
    return section.num_train_epochs


def models_to_train(section: RewardModelSection) -> int:
    """Each member of an ensemble trains on its own; heads share one trunk."""
    return 1 if section.differ_by == "head" else section.members


def models_that_score(section: RewardModelSection) -> int:
    """Every response is scored by each member, unless their weights became one model."""
    return 1 if section.combine == "average_weights" else models_to_train(section)


def reward_model_tokens(recipe: Recipe, data: TrainingRows) -> float:
    section = recipe.reward_model
    return models_to_train(section) * epochs(section, len(data.rows)) * data.compared_tokens


def reward_pass(recipe: Recipe, speed: Speed) -> Passes:
    """Scoring by the reward model: by every member of an ensemble."""
    n, one = models_that_score(recipe.reward_model), speed.reward
    return Passes(n * one.load_s, 0.0, n * one.score_s)


def _ppo_seconds(recipe: Recipe, data: TrainingRows, speed: Speed) -> float:
    """Rollouts (sampling; policy, reference, critic and reward model score them), and epochs of policy and critic.

    A critic on the policy's trunk adds no pass. One of its own starts from the reward model where it can.
    """
    section, of_rewards = recipe.ppo, recipe.reward_model
    if section.train_tokens is not None:
        sampled = (section.train_tokens - reward_model_tokens(recipe, data)) / section.num_ppo_epochs
    else:
        batch = section.per_device_train_batch_size
        sampled = len(Schedule([PromptIds("", [0])] * len(data.rows), section, 0)) * batch * data.mean_length
        sampled /= section.num_ppo_epochs * section.num_mini_batches
    scoring = [speed.policy, speed.policy]  # policy and reference
    trained = [speed.policy]
    if section.advantage == "gae" and not section.share_trunk:
        by_itself = recipe.model.lora is None or models_that_score(of_rewards) == 1
        trained.append(speed.reward if speed.critic_from_base and by_itself else speed.policy)
        scoring.append(trained[-1])
    if section.reward != "length":
        scoring.append(reward_pass(recipe, speed))
    seconds = speed.sample_s + sum(model.score_s for model in scoring)
    seconds += section.num_ppo_epochs * sum(model.train_s for model in trained)
    return sum(model.load_s for model in scoring) + max(sampled, 0.0) * seconds


def _dpo_seconds(recipe: Recipe, data: TrainingRows, speed: Speed) -> float:
    """The reference's scores of the data, and training. Online, two samples are drawn and scored for each prompt."""
    section = recipe.dpo
    n_tokens = section.train_tokens or epochs(section, len(data.rows)) * data.compared_tokens
    if section.online is None:
        return speed.load_s + data.compared_tokens * speed.score_s + n_tokens * speed.train_s
    labels = section.online.labels
    scoring = [speed.policy]  # the reference
    if labels == "rm":
        scoring.append(reward_pass(recipe, speed))
    elif labels.startswith("rm:"):
        scoring.append(speed.policy)  # a model of a size that is not known
    seconds = speed.sample_s + sum(model.score_s for model in scoring) + speed.train_s
    return speed.load_s + sum(model.load_s for model in scoring) + n_tokens * seconds


def evaluation_seconds(recipe: Recipe, data: TrainingRows, n_held_out: int, speed: Speed) -> float:
    """Sampling every policy, and scoring samples and held-out responses by reference, DPO's policy and reward model.

    SFT and the arms write as the data does, the base policy up to the length limit. Judges are not in it.
    """
    section, rewards = recipe.evaluate, reward_pass(recipe, speed)
    n_checkpoints = (recipe.ppo.num_checkpoints + recipe.dpo.num_checkpoints - 2) * section.checkpoints
    n_undecided = min(n_held_out, section.checkpoint_prompts or n_held_out)
    longest = section.max_new_tokens or recipe.data.max_response_tokens
    sampled = data.mean_length * (n_held_out * _samples(section) + n_undecided * n_checkpoints)
    sampled += n_undecided * longest * recipe.sft.enabled
    held_out = n_held_out * data.tokens / len(data.rows)
    n_loads = 5 + n_checkpoints + recipe.sft.enabled  # SFT, both arms, and the two beside the reward model that score
    seconds = n_loads * speed.load_s + rewards.load_s
    seconds += sampled * (speed.sample_s + 2.5 * speed.score_s + rewards.score_s)
    return seconds + held_out * (2 * speed.score_s + rewards.score_s)


def _samples(section: EvaluateSection) -> int:
    """For each held-out prompt, those of SFT, with the pool of best-of-n, and of both arms."""
    return 3 * section.samples_per_prompt + section.best_of_n
