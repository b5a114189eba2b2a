"""Proximal policy optimisation of a language model against a reward model, on transformers' Trainer.

The details that decide whether PPO works, each with its source (N+ is Huang et al. 2024, arXiv 2403.17031):

 1. Dropout is off in every model, so that the ratio of the first update is exactly 1 (N+, detail 4;
    ``models/inspect.py``).
 2. The critic starts from the reward model's trunk with a head of zeros (N+; ``models.py``), so that its first values
    are 0, the mean of the centred scores; ``value_head_init=reward_model`` keeps the head (Ouyang et al. 2022).
 3. The reward model is centred so that SFT samples score 0 (N+; Ouyang et al. 2022; ``stages/reward_model.py``).
 4. Rollouts are sampled with temperature alone: no top-k, top-p or repetition penalty (``engine/sampling.py``), and the
    logits are divided by that temperature in rollout, training and reference alike (N+, detail 9).
 5. Old log-probabilities come from a forward pass under the autocast and in the packing of training, never from the
    sampler (``rollout.py``).
 6. The score is read at the EOS, the last token of a response (N+, "EOS trick"). A response without one has its score
    *replaced* by ``missing_eos_penalty``. Only the completion is searched for an EOS, for all of the model's EOS ids.
 7. Scores are clipped before that (OpenRLHF +-10).
 8. The KL penalty is k1 per token, unclamped (Ziegler et al. 2019); k1 and k3 are logged, summed per response.
 9. Rewards are not whitened by default; with ``whiten_rewards`` their mean stays (N+; AlpacaFarm).
10. gamma 1, lambda 0.95 (N+); GAE ends at the last token of a response (``objective.gae``).
11. Advantages are whitened over the sampled tokens of the whole rollout of all processes.
12. Policy and value losses are clipped at 0.2 (Schulman et al. 2017; N+), summed over tokens and divided by the token
    count of the whole minibatch, so that accumulating parts equals one big batch.
13. ``num_ppo_epochs x num_mini_batches`` optimiser steps per rollout, each a real one. A minibatch holds whole prompts
    with all their samples (a tree batch), where N+ shuffles single responses.
14. Adam's epsilon is 1e-5 (N+, detail 5: PyTorch's 1e-8 makes early updates aggressive); gradients are clipped at 1.
15. The critic has a learning rate of its own (``value_learning_rate``), and its loss the factor ``vf_coef``.
16. ``adaptive_kl`` is Ziegler's controller; ``target_kl`` ends the updates of a rollout (OpenAI's spinning-up, PPO);
    ``max_kl`` stops training when the rollouts pass it.
17. The reference is the policy that training started from: the base where a new adapter is trained, and a frozen copy
    of the adapter where the policy came with one (``models.py``).
18. Off by default: a critic warm-up and an average of the policy's weights (Zheng et al. 2023, "PPO-max",
    arXiv 2307.04964), the likelihood of other text mixed in (Ouyang et al. 2022, equation 2), the dual clip (Ye et al.
    2020), a critic that is a head on the policy's trunk (``share_trunk``).
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from toolkit.engine.distributed import all_items, all_sum, reduce_gradients, world
from toolkit.engine.logps import by_response
from toolkit.errors import DataError, RecipeError
from toolkit.files import read_json, write_json
from toolkit.models.encoding import Tree
from toolkit.models.inspect import precision
from toolkit.ppo import export, objective
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.models import Actors
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.rewards import Sampled, Source, Steps, combine
from toolkit.ppo.rollout import Generator, Part, Rollout, collect, dense, sample, scored
from toolkit.ppo.schedule import Schedule

STATE_FILE = "actors.safetensors"
AVERAGE_FILE = "average.safetensors"
CONTROL_FILE = "ppo_state.json"


class PPOLoop(Trainer):
    """PPO over ``actors``. One step of the Trainer is one optimiser step on one minibatch of the current rollout.

    ``rewards`` are sources (``rewards.py``); ``keep(step)`` is called when the KL first passes a milestone.
    :class:`toolkit.ppo.PPOTrainer` builds all this from models and data sets.
    """

    args: PPOConfig

    def __init__(
        self,
        actors: Actors,
        args: PPOConfig,
        prompts: Sequence[PromptIds],
        rewards: Sequence[Source],
        processing_class: PreTrainedTokenizerBase,
        *,
        eval_prompts: Sequence[PromptIds] = (),
        ptx: Sequence[Tree] = (),
        eos_ids: Sequence[int],
        dtype: torch.dtype,
        keep: Callable[[int], None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args = copy.copy(args)  # the caller's stay as they are
        self.eval_prompts, self.ptx, self.rewards = eval_prompts, ptx, list(rewards)
        self.weights = args.reward_weights or [1.0] * len(self.rewards)
        if len(self.weights) != len(self.rewards):
            raise RecipeError(
                f"{len(self.rewards)} rewards and {len(self.weights)} weights", where="reward_weights", fix="one each"
            )
        if args.ptx_coef and not ptx:
            raise RecipeError("there is no text to mix in", where="ptx_coef", fix="give a ptx_dataset")
        self.how = Generator(processing_class, eos_ids, dtype, args.seed)
        self.schedule = Schedule(prompts, args, args.seed, args.world_size)
        if args.max_steps <= 0:
            args.max_steps = len(self.schedule)
        if args.max_steps > len(self.schedule):
            raise RecipeError(
                f"max_steps is {args.max_steps}, and all episodes are done after {len(self.schedule)} optimiser steps",
                where="max_steps, total_episodes",
                fix="leave out one of them",
            )
        # Inside a rollout a checkpoint could not be resumed: its samples are not kept.
        if args.save_strategy == "steps":
            every = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps  # a share of all
            args.save_steps = (
                max(1, round(every / self.schedule.updates_per_rollout)) * self.schedule.updates_per_rollout
            )
        # A minibatch is divided by tokens; the Trainer's own accumulation would merge updates and add rollouts.
        self.accumulation = args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
        self.rollout: Rollout | None = None
        self.skipping = False
        self.controller = objective.AdaptiveKl(args.kl_coef, args.adaptive_kl_target, args.adaptive_kl_horizon)
        self.centre: float | None = None if args.center_samples else 0.0
        self.milestones = sorted(args.kl_milestones or [])
        self.keep = keep
        self.sums: dict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=actors,
            args=args,
            train_dataset=self.schedule,
            eval_dataset=list(eval_prompts) or None,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.average: dict[str, torch.Tensor] | None = None
        if args.ema_decay is not None:
            self.average = {name: weight.clone() for name, weight in self._policy_state().items()}
            self.add_callback(_Averaging(self))
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    # -- data and optimiser

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Steps in order. Every process sees each step: what is divided among them are a rollout's prompts."""
        return DataLoader(self.schedule, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            value_rate = self.args.value_learning_rate
            if value_rate is None:
                value_rate = self.args.learning_rate
            decay = {"weight_decay": self.args.weight_decay}
            groups = [
                {"params": self.actors.policy_parameters(), "lr": self.args.learning_rate, **decay},
                {"params": self.actors.critic_parameters(), "lr": value_rate, **decay},
            ]
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, self.actors)
            takes_groups = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
            # Those of "schedule free" have other weights for evaluation, which a rollout would have to ask for.
            if (
                not takes_groups
                or hasattr(optimizer, "eval")
                or settings.keys() & {"params", "model", "optimizer_dict"}
            ):
                raise RecipeError(
                    f"PPO cannot train with {self.args.optim.value}, which chooses its weights itself or has others to "
                    "sample from",
                    where="optim",
                    fix="take another, such as adamw_torch_fused",
                )
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    @property
    def actors(self) -> Actors:
        return self.accelerator.unwrap_model(self.model)

    # -- one optimiser step

    def train(self, *args: Any, **more: Any) -> Any:
        """As ``Trainer.train``, on new rollouts."""
        self.rollout = None
        return super().train(*args, **more)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.rollout is None or self.rollout.index != inputs["rollout"]:
            self.rollout = self._collect(inputs["rollout"], inputs["prompts"])
            self.skipping = False
        if self.skipping:  # without gradients the optimiser changes nothing
            return torch.zeros((), device=self.args.device)
        began = time.perf_counter()
        epoch, minibatch = divmod(inputs["update"], self.args.num_mini_batches)
        # Each inner epoch takes the minibatches in another order; the first in theirs, which is random.
        order = list(range(self.args.num_mini_batches))
        if epoch > 0:
            random.Random(f"{self.args.seed}/{inputs['rollout']}/{epoch}").shuffle(order)
        parts = self.rollout.minibatches[order[minibatch]]
        own_tokens = sum(int(part.mask_ST.sum()) for part in parts)
        n_tokens = int(all_sum(torch.tensor(own_tokens, device=self.args.device)))
        warming = inputs["rollout"] < self.args.critic_warmup_rollouts
        self.actors.train()
        totals = torch.zeros(len(_SUMS), dtype=torch.float64)
        for part in parts:
            sums_of = self._backward(part, n_tokens, warming=warming)
            totals += torch.tensor(sums_of, dtype=torch.float64)
        if self.args.ptx_coef and not warming:
            totals[_SUMS.index("ptx")] += self._ptx_backward(inputs)
        # The losses are divided by the tokens of all processes, so gradients add up.
        reduce_gradients(self.actors, mean=False)
        sums = dict(zip(_SUMS, all_sum(totals.to(self.args.device)).tolist(), strict=True))
        metrics = {
            "policy/ratio": sums["ratio"] / n_tokens,
            "policy/clip_fraction": sums["clipped"] / n_tokens,
            "policy/approx_kl": sums["approx_kl"] / n_tokens,
            "loss/policy": sums["policy_loss"],
            "value/loss": sums["value_loss"],
            "value/clip_fraction": sums["value_clipped"] / n_tokens,
            "speed/update_tokens_per_s": own_tokens / max(time.perf_counter() - began, 1e-9),
        }
        if self.args.ptx_coef:
            metrics["loss/ptx"] = sums["ptx"]
        if inputs["update"] == 0:
            self.sums["policy/first_ratio_error"].append(abs(metrics["policy/ratio"] - 1))
        if self.args.target_kl is not None and metrics["policy/approx_kl"] > self.args.target_kl:
            self.skipping = True
        for name, value in metrics.items():
            self.sums[name].append(value)
        # The Trainer averages what the processes return.
        total = sums["policy_loss"] + self.args.vf_coef * sums["value_loss"] + self.args.ptx_coef * sums["ptx"]
        return torch.tensor(total, device=self.args.device)

    def _backward(self, part: Part, n_tokens: int, *, warming: bool) -> list[float]:
        """Gradients of one part, and the sums for the log. Two backward passes, since the graphs of policy and critic
        need not be in memory together; one where they share a trunk."""
        args, width = self.args, part.mask_ST.shape[1]
        shared = self.actors.shares_trunk
        values_N: torch.Tensor | None = None
        with precision(args.device, self.how.dtype), torch.set_grad_enabled(not warming):
            if shared:
                logps_N, _, values_N = self.actors.logps_and_values(part.batch, args.temperature)
            else:
                logps_N, _ = self.actors.policy_logps(part.batch, args.temperature)
        policy = objective.policy_loss(
            dense(logps_N, part.batch, width),
            part.old_logps_ST,
            part.advantages_ST,
            part.mask_ST,
            cliprange=args.cliprange,
            n_tokens=n_tokens,
            dual_clip=args.dual_clip,
        )
        if not (shared or warming):
            self.accelerator.backward(policy.loss)
        if values_N is None or warming:
            with precision(args.device, self.how.dtype):
                values_N = self.actors.values(part.batch)
        value, value_clipped = objective.value_loss(
            dense(values_N, part.batch, width),
            part.old_values_ST,
            part.returns_ST,
            part.mask_ST,
            cliprange_value=args.cliprange_value,
            n_tokens=n_tokens,
        )
        together = args.vf_coef * value + (policy.loss if shared and not warming else 0.0)
        self.accelerator.backward(together)
        if shared and warming:  # the critic alone is its head: the policy's trunk stays as it is
            for weight in self.actors.policy_parameters():
                weight.grad = None
        return [
            policy.loss.item(),
            value.item(),
            policy.ratio_sum.item(),
            policy.clipped.item(),
            policy.approx_kl_sum.item(),
            value_clipped.item(),
            0.0,
        ]

    def _ptx_backward(self, inputs: Any) -> float:
        """Gradients of the negative log-likelihood per token of this step's share of the other text."""
        rank, size = world()
        step = inputs["rollout"] * self.schedule.updates_per_rollout + inputs["update"]
        first = step * self.args.ptx_batch_size
        chosen = [self.ptx[i % len(self.ptx)] for i in range(first, first + self.args.ptx_batch_size)]
        n_tokens = sum(len(ids) for tree in chosen for ids in tree.response_ids)
        own = chosen[rank::size]
        if not own:
            return 0.0
        self.actors.use_policy()
        with precision(self.args.device, self.how.dtype):
            logps_N, _ = self.actors.policy_logps(self.actors.engine.pack(own), 1.0)
        loss = -logps_N.sum() / n_tokens
        self.accelerator.backward(self.args.ptx_coef * loss)
        return loss.item()

    def _score(self, sampled: Sampled) -> tuple[list[float], list[Steps]]:
        scores, steps = combine([source(sampled) for source in self.rewards], self.weights)
        return [value - (self.centre or 0.0) for value in scores], steps

    def _centre(self) -> None:
        """The mean score of samples of the policy that training starts from, which becomes 0."""
        rank, size = world()
        places = range(rank, self.args.center_samples, size)
        own = [self.schedule.prompt_at(i) for i in places]
        keys = [(self.args.seed, "centre", i, p.prompt_id) for i, p in zip(places, own, strict=True)]
        batch = self.args.per_device_train_batch_size
        _, sampled = sample(self.actors, own, keys, self.args, self.how, 1, batch)
        with torch.no_grad(), precision(self.args.device, self.how.dtype):
            scores, _ = scored(self._score, sampled)
        self.centre = math.fsum(all_items(scores)) / self.args.center_samples

    def _collect(self, index: int, prompts: Sequence[PromptIds]) -> Rollout:
        if self.centre is None:
            self._centre()
        rollout = collect(
            self.actors,
            prompts,
            self.args,
            self._score,
            self.how,
            index=index,
            kl_coef=self.controller.coef,
            passes=self.accumulation,
        )
        kl = rollout.metrics["objective/kl"]
        if self.args.adaptive_kl:
            self.controller.update(kl, len(prompts) * self.args.samples_per_prompt)
        if self.args.max_kl is not None and kl > self.args.max_kl:
            self.control.should_training_stop = True
        passed = [milestone for milestone in self.milestones if kl >= milestone]
        if passed and self.keep is not None and self.is_world_process_zero():
            self.keep(self.state.global_step)
        self.milestones = self.milestones[len(passed) :]
        for name, value in rollout.metrics.items():
            self.sums[name].append(value)
        every = self.args.log_completions_steps
        if every and index % max(1, every // self.schedule.updates_per_rollout) == 0:
            rows = all_items(rollout.table)
            if self.is_world_process_zero():
                export.write_completions(rows, Path(self.args.output_dir), self.state.global_step)
        return rollout

    # -- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample each held-out prompt once and log score, KL to the reference, length and end-of-text rate."""
        prompts = list(eval_dataset) if eval_dataset is not None else list(self.eval_prompts)
        if not prompts:
            raise DataError("there is no prompt to evaluate on", where="eval_dataset", fix="give the trainer one")
        if self.centre is None:
            self._centre()
        rank, size = world()
        own = prompts[rank::size]
        keys = [(self.args.seed, "eval", p.prompt_id) for p in own]
        samples, sampled = sample(self.actors, own, keys, self.args, self.how, 1, self.args.per_device_eval_batch_size)
        actors, temperature = self.actors, self.args.temperature
        with torch.no_grad(), precision(self.args.device, self.how.dtype):
            scores, steps = scored(self._score, sampled)

            def kl_of(batch: Any) -> list[float]:
                logps_N, _ = actors.policy_logps(batch, temperature)
                difference = logps_N - actors.reference_logps(batch, temperature)
                return by_response(difference.double(), batch).tolist()  # type: ignore[no-any-return]

            kl = [value for values in actors.engine.map_responses(sampled.trees, kl_of) for value in values]
        rows = [
            (score + sum(value for _, value in found), nats, len(s.ids), not s.truncated)
            for score, found, nats, s in zip(scores, steps, kl, samples, strict=True)
        ]
        rows = sorted(all_items(rows))
        names = ("objective/score", "objective/kl", "length/mean", "eos_rate")
        metrics = {
            f"{metric_key_prefix}_{name}": sum(float(row[i]) for row in rows) / len(rows)
            for i, name in enumerate(names)
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- log, checkpoints, export

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_runtime" in logs:
            for name, values in self.sums.items():
                logs[name] = sum(values) / len(values)
            self.sums.clear()
        super().log(logs, start_time)

    def _policy_state(self) -> dict[str, torch.Tensor]:
        return {str(i): weight.detach() for i, weight in enumerate(self.actors.policy_parameters())}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The policy's weights are their average for the while, where one is kept."""
        if self.average is None:
            yield
            return
        # The tensors are exchanged, not written to: the policy's own come back bit for bit.
        weights = self.actors.policy_parameters()
        kept = [weight.data for weight in weights]
        for i, weight in enumerate(weights):
            weight.data = self.average[str(i)]
        try:
            yield
        finally:
            for weight, own in zip(weights, kept, strict=True):
                weight.data = own

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy as a plain model or adapter with its tokenizer and a model card, the critic in ``critic/``.

        In a checkpoint (which the Trainer writes itself): what training changes, in full precision.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            return
        if _internal_call:
            self._save_state(folder)
        else:
            self.export(folder)
            self.actors.save_critic(folder / "critic")

    def export(self, folder: Path) -> None:
        """The policy (its average where one is kept) as a plain model or adapter, with tokenizer and model card."""
        folder.mkdir(parents=True, exist_ok=True)
        with self.averaged():
            self.actors.save_policy(folder, self.how.tokenizer)
        export.write_card(folder, self.args, self.state.log_history, self.schedule.rollouts)

    def _save_state(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: weight.contiguous().cpu() for name, weight in self.actors.trained_state().items()}
        save_file(state, folder / STATE_FILE)
        if self.average is not None:
            save_file({name: weight.contiguous().cpu() for name, weight in self.average.items()}, folder / AVERAGE_FILE)
        control = {"kl_coef": self.controller.coef, "centre": self.centre, "milestones": self.milestones}
        control["sums"] = self.sums  # what is to be logged yet
        write_json(folder / CONTROL_FILE, control)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.actors.load_trained_state(load_file(folder / STATE_FILE))
        if self.average is not None:
            device = self.args.device
            self.average = {name: weight.to(device) for name, weight in load_file(folder / AVERAGE_FILE).items()}
        control = read_json(folder / CONTROL_FILE)
        self.controller.coef, self.centre = control["kl_coef"], control["centre"]
        self.milestones = control["milestones"]
        self.sums = defaultdict(list, control["sums"])


# What a minibatch adds up over its parts and processes.
_SUMS = ("policy_loss", "value_loss", "ratio", "clipped", "approx_kl", "value_clipped", "ptx")


class _Averaging(TrainerCallback):
    """Moves the average of the policy's weights after every optimiser step."""

    def __init__(self, loop: PPOLoop) -> None:
        self.loop = loop

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.loop.average is not None
        for name, weight in self.loop._policy_state().items():
            self.loop.average[name].lerp_(weight, 1 - self.loop.args.ema_decay)
