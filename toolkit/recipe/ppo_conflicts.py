"""Settings of PPO that exclude each other, in a recipe and in ``PPOConfig`` alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.recipe.schema import PpoSection


@dataclass(frozen=True)
class Conflict:
    """``names``: the settings that exclude each other."""

    what: str
    fix: str
    names: tuple[str, ...]


def ppo_conflicts(ppo: PpoSection) -> Iterator[Conflict]:
    """Every conflict between settings that recipes and ``PPOConfig`` share."""
    batch, samples = ppo.per_device_train_batch_size, ppo.samples_per_prompt
    prompts = batch // samples
    if batch % samples:
        yield Conflict(
            f"a rollout of {batch} responses does not divide by samples_per_prompt = {samples}",
            f"take a multiple of {samples}",
            ("per_device_train_batch_size", "samples_per_prompt"),
        )
    if prompts < ppo.num_mini_batches:
        yield Conflict(
            f"{prompts} prompts in a rollout do not fill {ppo.num_mini_batches} mini-batches of whole prompts",
            f"at most {prompts} mini-batches",
            ("per_device_train_batch_size", "samples_per_prompt", "num_mini_batches"),
        )
    if ppo.adaptive_kl and ppo.kl_coef == 0:
        yield Conflict(
            "the adaptive controller multiplies a KL coefficient of 0",
            "start above 0 (Ziegler et al. 2019: 0.2)",
            ("adaptive_kl", "kl_coef"),
        )
    if ppo.share_trunk and ppo.value_learning_rate not in (None, ppo.learning_rate):
        yield Conflict(
            "a critic on the policy's trunk learns at the policy's rate",
            "leave out one of them",
            ("share_trunk", "value_learning_rate"),
        )
