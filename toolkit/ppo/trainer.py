"""Proximal policy optimisation of a language model against a reward model, on transformers' Trainer.

The details that decide whether PPO works, each with its source (N+ is Huang et al. 2024, arXiv 2403.17031):

 1. Dropout is off in every model, so that the ratio of the first update is exactly 1 (N+, detail 4; ``models.py``).
 2. The critic starts from the reward model's trunk with a head of zeros (N+; ``actors.py``), so that its first values
    are 0, the mean of the centred scores; ``value_head_init=reward_model`` keeps the head (Ouyang et al. 2022).
 3. The reward model is centred so that SFT samples score 0 (N+; Ouyang et al. 2022; ``stages/reward_model.py``).
 4. Rollouts are sampled with temperature alone: no top-k, top-p or repetition penalty (``generation.py``), and the
    logits are divided by that temperature in rollout, training and reference alike (N+, detail 9).
 5. Old log-probabilities come from a forward pass under the autocast and in the packing of training, never from the
    sampler (``rollout.py``).
 6. The score is read at the EOS, the last token of a response (N+, "EOS trick"). A response without one has its score
    *replaced* by ``missing_eos_penalty``. Only the completion is searched for an EOS, for all of the model's EOS ids.
 7. Scores are clipped before that (OpenRLHF +-10).
 8. The KL penalty is k1 per token, unclamped (Ziegler et al. 2019); k1 and k3 are logged, summed per response.
 9. Rewards are not whitened by default; with ``whiten_rewards`` their mean stays (N+; AlpacaFarm).
10. gamma 1, lambda 0.95 (N+); GAE ends at the last token of a response (``objective.gae``).
11. Advantages are whitened over the sampled tokens of the whole rollout.
12. Policy and value losses are clipped at 0.2 (Schulman et al. 2017; N+), summed over tokens and divided by the token
    count of the whole minibatch, so that accumulating parts equals one big batch.
13. ``num_ppo_epochs x num_mini_batches`` optimiser steps per rollout, each a real one. A minibatch holds whole prompts
    with all their samples (a tree batch), where N+ shuffles single responses.
14. Adam's epsilon is 1e-5 (N+, detail 5: PyTorch's 1e-8 makes early updates aggressive); gradients are clipped at 1.
15. The critic has a learning rate of its own (``value_learning_rate``), and its loss the factor ``vf_coef``.
16. ``adaptive_kl`` is Ziegler's controller; ``max_kl`` stops training when the rollouts pass it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from toolkit import models
from toolkit.errors import RecipeError
from toolkit.ppo import objective
from toolkit.ppo.actors import Actors
from toolkit.ppo.rollout import Part, PromptIds, Rollout, collect, dense
from toolkit.recipe import PpoSection
from toolkit.store import read_json, write_json
from toolkit.training import average_gradients

STATE_FILE = "actors.safetensors"
CONTROL_FILE = "ppo_state.json"


class Schedule(Dataset[dict[str, Any]]):
    """Item i is optimiser step i: which rollout it belongs to, which of its updates it is, and the rollout's prompts.

    Prompts go round in an order that is shuffled anew in each pass, a function of the seed alone.
    """

    def __init__(self, prompts: Sequence[PromptIds], section: PpoSection, seed: int) -> None:
        self.prompts = prompts
        self.per_rollout = section.per_device_train_batch_size // section.samples_per_prompt
        self.updates = section.num_ppo_epochs * section.num_mini_batches
        self.rollouts = max(1, section.total_episodes // section.per_device_train_batch_size)
        self.seed = seed
        if not prompts:
            raise RecipeError("there is no prompt to train PPO on", where="data", fix="raise data.train_prompts")

    def __len__(self) -> int:
        return self.rollouts * self.updates

    def __getitem__(self, step: int) -> dict[str, Any]:
        rollout, update = divmod(step, self.updates)
        first = rollout * self.per_rollout
        chosen = [self._prompt(position) for position in range(first, first + self.per_rollout)]
        return {"rollout": rollout, "update": update, "prompts": chosen}

    def _prompt(self, position: int) -> PromptIds:
        round_, offset = divmod(position, len(self.prompts))
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/{round_}").shuffle(order)
        return self.prompts[order[offset]]


class PPOTrainer(Trainer):
    """PPO over ``actors``. One step of the Trainer is one optimiser step on one minibatch of the current rollout."""

    def __init__(
        self,
        actors: Actors,
        args: TrainingArguments,
        section: PpoSection,
        prompts: Sequence[PromptIds],
        processing_class: PreTrainedTokenizerBase,
        *,
        eos_ids: Sequence[int],
        response_length: int,
        dtype: torch.dtype,
        token_budget: int = 4096,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.section, self.eos_ids, self.response_length, self.dtype = section, eos_ids, response_length, dtype
        self.token_budget = token_budget
        # A minibatch is divided by tokens; the Trainer's own accumulation would merge updates and add rollouts.
        args.gradient_accumulation_steps = 1
        self.schedule = Schedule(prompts, section, args.seed)
        self.rollout: Rollout | None = None
        self.controller = objective.AdaptiveKl(section.kl_coef, section.adaptive_kl_target, section.adaptive_kl_horizon)
        self.sums: dict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=actors,
            args=args,
            train_dataset=self.schedule,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    # -- data and optimiser

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Steps in order. Every process sees each step: what is divided among them are a rollout's prompts."""
        return DataLoader(self.schedule, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            value_rate = self.section.value_learning_rate or self.section.learning_rate
            groups = [
                {"params": self.actors.policy_parameters(), "lr": self.section.learning_rate},
                {"params": self.actors.critic_parameters(), "lr": value_rate},
            ]
            self.optimizer = torch.optim.AdamW(
                groups,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    @property
    def actors(self) -> Actors:
        return self.accelerator.unwrap_model(self.model)

    # -- one optimiser step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.rollout is None or self.rollout.index != inputs["rollout"]:
            self.rollout = self._collect(inputs["rollout"], inputs["prompts"])
        epoch, minibatch = divmod(inputs["update"], self.section.num_mini_batches)
        # Each inner epoch takes the minibatches in another order; the first in theirs, so that it starts at ratio 1.
        order = list(range(self.section.num_mini_batches))
        random.Random(f"{self.args.seed}/{inputs['rollout']}/{epoch}").shuffle(order)
        parts = self.rollout.minibatches[order[minibatch]]
        n_tokens = sum(int(part.mask_ST.sum()) for part in parts)
        self.actors.train()
        sums: dict[str, float] = defaultdict(float)
        for part in parts:
            for name, value in self._backward(part, n_tokens).items():
                sums[name] += value
        average_gradients(self.actors)
        first = inputs["update"] == 0
        metrics = {
            "policy/ratio": sums["ratio"] / n_tokens,
            "policy/clip_fraction": sums["clipped"] / n_tokens,
            "policy/approx_kl": sums["approx_kl"] / n_tokens,
            "loss/policy": sums["policy_loss"],
            "value/loss": sums["value_loss"],
            "value/clip_fraction": sums["value_clipped"] / n_tokens,
        }
        if first:
            self.sums["policy/first_ratio_error"].append(abs(metrics["policy/ratio"] - 1))
        for name, value in metrics.items():
            self.sums[name].append(value)
        total = sums["policy_loss"] + self.section.vf_coef * sums["value_loss"]
        return torch.tensor(total, device=self.args.device)

    def _backward(self, part: Part, n_tokens: int) -> dict[str, float]:
        """Gradients of one part. Two backward passes, since policy and critic never live in memory together."""
        section, width = self.section, part.mask_ST.shape[1]
        with models.precision(self.args.device, self.dtype):
            logps_N, _ = self.actors.policy_logps(part.batch, section.temperature)
        policy = objective.policy_loss(
            dense(logps_N, part.batch, width),
            part.old_logps_ST,
            part.advantages_ST,
            part.mask_ST,
            cliprange=section.cliprange,
            n_tokens=n_tokens,
        )
        self.accelerator.backward(policy.loss)
        with models.precision(self.args.device, self.dtype):
            values_N = self.actors.values(part.batch)
        value, value_clipped = objective.value_loss(
            dense(values_N, part.batch, width),
            part.old_values_ST,
            part.returns_ST,
            part.mask_ST,
            cliprange_value=section.cliprange_value,
            n_tokens=n_tokens,
        )
        self.accelerator.backward(section.vf_coef * value)
        return {
            "policy_loss": policy.loss.item(),
            "value_loss": value.item(),
            "ratio": policy.ratio_sum.item(),
            "clipped": policy.clipped.item(),
            "approx_kl": policy.approx_kl_sum.item(),
            "value_clipped": value_clipped.item(),
        }

    def _collect(self, index: int, prompts: Sequence[PromptIds]) -> Rollout:
        rollout = collect(
            self.actors,
            prompts,
            self.section,
            index=index,
            seed=self.args.seed,
            kl_coef=self.controller.coef,
            response_length=self.response_length,
            eos_ids=self.eos_ids,
            pad_id=int(self.processing_class.pad_token_id),
            dtype=self.dtype,
            token_budget=self.token_budget,
        )
        kl = rollout.metrics["objective/kl"]
        if self.section.adaptive_kl:
            self.controller.update(kl, self.section.per_device_train_batch_size)
        if self.section.max_kl is not None and kl > self.section.max_kl:
            self.control.should_training_stop = True
        for name, value in rollout.metrics.items():
            self.sums[name].append(value)
        return rollout

    # -- log and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self.sums.items():
            logs[name] = sum(values) / len(values)
        self.sums.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint holds what training changes: policy and critic, and the KL controller."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: weight.contiguous().cpu() for name, weight in self.actors.trained_state().items()}
        save_file(state, folder / STATE_FILE)
        write_json(folder / CONTROL_FILE, {"kl_coef": self.controller.coef})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.actors.load_trained_state(load_file(folder / STATE_FILE))
        self.controller.coef = read_json(folder / CONTROL_FILE)["kl_coef"]
