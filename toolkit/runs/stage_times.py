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
from toolkit.recipe.schema import EvaluateSection, Recipe, Training
from toolkit.runs.calibration import Speed


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
        return speed.load_s + reward_model_tokens(recipe, data) * speed.train_s
    return (_ppo_seconds if stage == "ppo" else _dpo_seconds)(recipe, data, speed)


def epochs(section: Training, n_prompts: int) -> float:
    if section.max_steps > 0:
        return section.max_steps * section.per_device_train_batch_size / n_prompts
    return section.num_train_epochs


def reward_model_tokens(recipe: Recipe, data: TrainingRows) -> float:
    """Each member of an ensemble trains on its own; heads share one trunk."""
    section = recipe.reward_model
    passes = 1 if section.differ_by == "head" else section.members
    return passes * epochs(section, len(data.rows)) * data.compared_tokens


def _ppo_seconds(recipe: Recipe, data: TrainingRows, speed: Speed) -> float:
    """Rollouts (sampling; policy, reference, critic and reward model score them), and epochs of policy and critic.

    A critic on the policy's trunk adds no pass.
    """
    section = recipe.ppo
    if section.train_tokens is not None:
        sampled = (section.train_tokens - reward_model_tokens(recipe, data)) / section.num_ppo_epochs
    else:
        batch = section.per_device_train_batch_size
        sampled = len(Schedule([PromptIds("", [0])] * len(data.rows), section, 0)) * batch * data.mean_length
        sampled /= section.num_ppo_epochs * section.num_mini_batches
    second_model = section.advantage == "gae" and not section.share_trunk
    passes = 3 + second_model
    training = section.num_ppo_epochs * (1 + second_model) * speed.train_s
    return passes * speed.load_s + max(sampled, 0.0) * (speed.sample_s + passes * speed.score_s + training)


def _dpo_seconds(recipe: Recipe, data: TrainingRows, speed: Speed) -> float:
    """The reference's scores of the data, and training. Online, two samples are drawn and scored for each prompt."""
    section = recipe.dpo
    n_tokens = section.train_tokens or epochs(section, len(data.rows)) * data.compared_tokens
    if section.online is not None:
        passes = 2  # the reference and the reward model
        return (1 + passes) * speed.load_s + n_tokens * (speed.sample_s + passes * speed.score_s + speed.train_s)
    return speed.load_s + data.compared_tokens * speed.score_s + n_tokens * speed.train_s


def evaluation_seconds(recipe: Recipe, data: TrainingRows, n_held_out: int, speed: Speed) -> float:
    """Sampling every policy, and scoring samples and held-out responses by reference, DPO's policy and reward model.

    SFT and the arms write as the data does, the base policy up to the length limit. Judges are not in it.
    """
    section = recipe.evaluate
    n_checkpoints = (recipe.ppo.num_checkpoints + recipe.dpo.num_checkpoints - 2) * section.checkpoints
    n_undecided = min(n_held_out, section.checkpoint_prompts or n_held_out)
    longest = section.max_new_tokens or recipe.data.max_response_tokens
    sampled = data.mean_length * (n_held_out * _samples(section) + n_undecided * n_checkpoints)
    sampled += n_undecided * longest * recipe.sft.enabled
    held_out = n_held_out * data.tokens / len(data.rows)
    n_loads = 6 + n_checkpoints + recipe.sft.enabled  # SFT, both arms, and the three that score
    return n_loads * speed.load_s + sampled * (speed.sample_s + 3.5 * speed.score_s) + held_out * 3 * speed.score_s


def _samples(section: EvaluateSection) -> int:
    """For each held-out prompt, those of SFT, with the pool of best-of-n, and of both arms."""
    return 3 * section.samples_per_prompt + section.best_of_n
