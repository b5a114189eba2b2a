"""Settings of PPO that exclude each other, in a recipe and in ``PPOConfig`` alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.recipe.training import PpoSection


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
    if ppo.ptx_texts is not None and not ppo.ptx_coef:
        yield Conflict("the texts would not count: their weight is 0", "ptx_coef: 1", ("ptx_texts", "ptx_coef"))
    if ppo.advantage == "rloo":
        yield from _rloo_conflicts(ppo)
    if ppo.share_trunk and ppo.value_learning_rate not in (None, ppo.learning_rate):
        yield Conflict(
            "a critic on the policy's trunk learns at the policy's rate",
            "leave out one of them",
            ("share_trunk", "value_learning_rate"),
        )


def _rloo_conflicts(ppo: PpoSection) -> Iterator[Conflict]:
    """What leave-one-out advantages need, and what asks for the critic that they do without."""
    if ppo.samples_per_prompt < 2:
        yield Conflict(
            "a leave-one-out baseline needs other samples of the same prompt",
            "at least 2 samples for each prompt",
            ("advantage", "samples_per_prompt"),
        )
    if ppo.share_trunk:
        yield Conflict("rloo has no critic to share a trunk with", "leave out one", ("advantage", "share_trunk"))
    if ppo.critic_warmup_rollouts:
        yield Conflict(
            "rloo has no critic to warm up: these rollouts would train nothing",
            "critic_warmup_rollouts: 0, or advantage: gae",
            ("advantage", "critic_warmup_rollouts"),
        )
