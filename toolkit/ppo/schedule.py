"""Which prompts each rollout of PPO samples from, and how many rollouts and optimiser steps there are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolkit.errors import RecipeError
from toolkit.ppo.prompts import PromptIds
from toolkit.recipe.training import PpoSection

if TYPE_CHECKING:
    from toolkit.ppo.config import PPOConfig


class Schedule:
    """Item i is optimiser step i: its rollout, its number among the rollout's updates, its minibatch, and the prompts.

    A rollout's prompts are those of all processes. Prompts come in rounds: each round takes every prompt once, in a new
    order that depends on the seed and nothing else.

    Raises RecipeError where there is no prompt.
    """

    def __init__(
        self, prompts: Sequence[PromptIds], config: PPOConfig | PpoSection, seed: int, processes: int = 1
    ) -> None:
        if not prompts:
            raise RecipeError("there is no prompt to train PPO on", where="data", fix="raise data.train_prompts")
        self.prompts, self.seed = prompts, seed
        batch = config.per_device_train_batch_size * processes
        self.prompts_per_rollout = batch // config.samples_per_prompt
        self.n_minibatches = config.num_mini_batches
        self.updates_per_rollout = config.num_ppo_epochs * config.num_mini_batches
        self.rollouts = self._count_rollouts(config, batch)
        self.orders: dict[int, list[int]] = {}  # round -> its order of the prompts, of the latest rounds

    def _count_rollouts(self, config: PPOConfig | PpoSection, batch: int) -> int:
        if config.total_episodes is not None:
            return max(1, config.total_episodes // batch)
        if config.max_steps > 0:
            return max(1, -(-config.max_steps // self.updates_per_rollout))
        episodes = round(config.num_train_epochs * len(self.prompts) * config.samples_per_prompt)
        return max(1, episodes // batch)

    def __len__(self) -> int:
        """Optimiser steps of the whole training."""
        return self.rollouts * self.updates_per_rollout

    def __getitem__(self, step: int) -> dict[str, Any]:
        rollout, update = divmod(step, self.updates_per_rollout)
        first = rollout * self.prompts_per_rollout
        prompts = [self.prompt_at(position) for position in range(first, first + self.prompts_per_rollout)]
        return {"rollout": rollout, "update": update, "minibatch": self._minibatch(rollout, update), "prompts": prompts}

    def _minibatch(self, rollout: int, update: int) -> int:
        """The first epoch takes a rollout's minibatches as they were drawn, each later one in another random order."""
        epoch, position = divmod(update, self.n_minibatches)
        order = list(range(self.n_minibatches))
        if epoch > 0:
            random.Random(f"{self.seed}/{rollout}/{epoch}").shuffle(order)
        return order[position]

    def prompt_at(self, position: int) -> PromptIds:
        """The prompt at this position of all rounds, counted through."""
        round_, offset = divmod(position, len(self.prompts))
        if round_ not in self.orders:
            order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{round_}").shuffle(order)
            # A rollout may begin in the round before.
            self.orders = {r: o for r, o in self.orders.items() if r == round_ - 1} | {round_: order}
        return self.prompts[self.orders[round_][offset]]
