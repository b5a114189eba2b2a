"""Proximal policy optimisation of a language model against a reward model, on transformers' Trainer.

The details that decide whether PPO works, each with its source (N+ is Huang et al. 2024, arXiv 2403.17031):

 1. Dropout is off in every model, so that the ratio of the first update is exactly 1 (N+, detail 4;
    ``models/inspect.py``).
 2. The critic starts from the reward model's trunk with a head of zeros (N+; ``assembly.py``), so that its first values
    are 0, the mean of the centred scores; ``value_head_init=reward_model`` keeps the head (Ouyang et al. 2022).
 3. The reward model is centred so that SFT samples score 0 (N+; Ouyang et al. 2022; ``stages/reward_model.py``).
 4. Rollouts are sampled at a temperature, without top-k, top-p or repetition penalty (``engine/sampling.py``); the
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
    count of the whole minibatch, so that accumulating microbatches equals one big batch.
13. ``num_ppo_epochs x num_mini_batches`` optimiser steps per rollout, each a real one. A minibatch holds whole prompts
    with all their samples (a tree batch), where N+ shuffles single responses.
14. Adam's epsilon is 1e-5 (N+, detail 5: PyTorch's 1e-8 makes early updates aggressive); gradients are clipped at 1.
15. The critic has a separate learning rate (``value_learning_rate``), and ``vf_coef`` weighs its loss.
16. ``adaptive_kl`` is Ziegler's controller; ``target_kl`` ends the updates of a rollout (OpenAI's spinning-up, PPO);
    ``max_kl`` stops training when a rollout's KL exceeds it.
17. The reference is the policy that training started from: the base where a new adapter is trained, and a frozen copy
    of the adapter where the policy came with one (``models.py``).
18. Off by default: a critic warm-up and an average of the policy's weights (Zheng et al. 2023, "PPO-max",
    arXiv 2307.04964), the likelihood of other text mixed in (Ouyang et al. 2022, equation 2), the dual clip (Ye et al.
    2020), a critic that is a head on the policy's trunk (``share_trunk``), a reference that follows the policy (Xu et
    al. 2024, arXiv 2404.10719, section 5): after each rollout's updates it is an average of itself and the policy, of
    the weights that train (with LoRA of the adapters' factors). The penalty is then on the KL to it; ``objective/kl``,
    ``max_kl``, milestones and evaluations stay with the policy that training started from.
19. ``advantage=rloo`` replaces 2, 10 and 15: no critic, and leave-one-out advantages (Ahmadian et al. 2024, arXiv
    2402.14740). The KL penalty stays in the reward, the whitening and the clipped ratio of each token stay, too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from toolkit.engine.distributed import all_items, all_sum, main_process, reduce_gradients
from toolkit.errors import DataError, RecipeError
from toolkit.ppo import checkpoint, export
from toolkit.ppo.averaging import WeightAverage
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.evaluation import evaluate_policy, milestone_log_ratios
from toolkit.ppo.kl_control import KlControl
from toolkit.ppo.models import PPOModels
from toolkit.ppo.prompts import PromptIds, TrainingData
from toolkit.ppo.rewards import RewardFunction
from toolkit.ppo.rollout import Rollout, collect
from toolkit.ppo.rollout_metrics import MetricMeans
from toolkit.ppo.sampling import SamplingSettings, Scorer
from toolkit.ppo.schedule import Schedule
from toolkit.ppo.update import NOTHING, Update, token_count
from toolkit.training.budget import VIRTUAL_STEPS, Budget, Spending
from toolkit.training.callbacks import log_table
from toolkit.training.checkpoints import CheckpointFiles
from toolkit.training.milestones import KlMilestones, MilestonePolicy
from toolkit.training.shards import Averages, ShardsTrainer
from toolkit.training.unlogged import Unlogged


class PPOLoop(ShardsTrainer):
    """PPO over ``models``. One step of the Trainer is one optimiser step on one minibatch of the current rollout.

    ``keep_milestone`` is called for each milestone of the KL that training passes, with the policy for it in place.
    ``spending`` counts the response tokens that updates train on, and ``budget`` ends training.
    :class:`toolkit.ppo.PPOTrainer` builds models, rewards and data from what a user has.
    """

    # transformers' Trainer owns the loop and calls back. On the left what PPO does, on the right what does it here:
    #
    #   for each rollout:                                      get_train_dataloader: the items of Schedule
    #       sample, score, compute advantages                  training_step, at a rollout's first item: collect_rollout
    #       adapt kl_coef, stop at max_kl, reach milestones    collect_rollout: KlControl, KlMilestones
    #       for each epoch, for each minibatch:                one item of Schedule each
    #           compute gradients of both losses               training_step: Update
    #           clip them, step the optimiser and the average  the Trainer; WeightAverage.on_optimizer_step
    #   log, evaluate, save at their intervals                 the Trainer, through log, evaluate and save_model

    args: PPOConfig

    def __init__(
        self,
        models: PPOModels,
        args: PPOConfig,
        rewards: Sequence[RewardFunction],
        data: TrainingData,
        sampling: SamplingSettings,
        *,
        keep_milestone: Callable[[MilestonePolicy], None] | None = None,
        spending: Spending | None = None,
        budget: Budget | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args = copy.copy(args)  # the caller's object stays as it is
        _check_rewards_and_text(args, rewards, data)
        self.data, self.sampling = data, sampling
        self.schedule = Schedule(data.prompts, args, args.seed, args.world_size)
        self.passes_per_minibatch = args.gradient_accumulation_steps
        _fit_to_rollouts(args, self.schedule)
        self.score = Scorer(rewards, args.reward_weights or [1.0] * len(rewards), None if args.center_samples else 0.0)
        self.kl_control = KlControl(args)
        self.rollout: Rollout | None = None
        self.skips_updates = False  # the current rollout's remaining ones, since approx_kl exceeded target_kl
        self.unlogged = MetricMeans()
        self.spending, self.budget = spending or Spending(), budget
        self.losses = Unlogged()  # the metrics are in `unlogged`
        counters = [self.spending, *([budget] if budget else []), self.losses]
        super().__init__(
            model=models,
            args=args,
            train_dataset=self.schedule,
            eval_dataset=list(data.eval_prompts) or None,
            processing_class=sampling.tokenizer,
            callbacks=[*counters, *(callbacks or []), CheckpointFiles()],
        )
        self.average: WeightAverage | None = None
        if args.ema_decay is not None:
            self.average = WeightAverage(models.policy_parameters(), args.ema_decay)
            self.add_callback(self.average)
        models.averaged_reference = None
        if args.reference_decay is not None:
            every = self.schedule.updates_per_rollout
            models.averaged_reference = WeightAverage(models.policy_parameters(), args.reference_decay, every)
            self.add_callback(models.averaged_reference)
        self.milestones = KlMilestones(
            args.kl_milestones or [] if keep_milestone is not None else [],
            models.policy_parameters(),
            lambda: milestone_log_ratios(self.models, self.schedule, self.args, self.sampling),
            keep_milestone or (lambda _: None),
        )
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        if models.sharded:
            self.keep_out_of_ddp()
            models.try_layouts([NOTHING, *data.ptx])

    @property
    def models(self) -> PPOModels:
        """The models without what accelerate wraps around them."""
        models: PPOModels = self.accelerator.unwrap_model(self.model)
        return models

    @property
    def sharded(self) -> nn.Module | None:
        return self.models.trained_module() if self.models.sharded else None

    def averages(self) -> Averages:
        there = {"average": self.average, "averaged_reference": self.models.averaged_reference}
        return {name: average.averages for name, average in there.items() if average is not None}

    # -- data and optimiser

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Steps in order. Every process sees each step: what is divided among them are a rollout's prompts."""
        schedule: Any = self.schedule  # a Dataset without the base class: a dry run has one, too, and needs no torch
        return DataLoader(schedule, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser that ``optim`` names, with one group of weights for the policy, and one for a critic."""
        if self.optimizer is None:
            args = self.args
            value_rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
            decay = {"weight_decay": args.weight_decay}
            groups = [{"params": self.models.policy_parameters(), "lr": args.learning_rate, **decay}]
            if self.models.has_critic:
                groups.append({"params": self.models.critic_parameters(), "lr": value_rate, **decay})
            model_for_choice: Any = self.models
            optimizer, settings = self.get_optimizer_cls_and_kwargs(args, model_for_choice)
            takes_groups = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
            # Those of "schedule free" have other weights for evaluation, which a rollout would have to ask for.
            two_modes = hasattr(optimizer, "eval")
            if not takes_groups or two_modes or settings.keys() & {"params", "model", "optimizer_dict"}:
                name = args.to_dict()["optim"]  # type: ignore[no-untyped-call]
                raise RecipeError(
                    f"PPO cannot train with {name}, which chooses its weights itself or has others to sample from",
                    where="optim",
                    fix="take another, such as adamw_torch_fused",
                )
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule of the learning rates: by steps, or under a budget by what is spent of it."""
        if self.budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.budget.follow(super().create_scheduler(VIRTUAL_STEPS, optimizer))
        return self.lr_scheduler

    # -- rollouts

    def train(self, *args: Any, **more: Any) -> Any:
        """As ``Trainer.train``, on new rollouts. Milestones that the last one's updates pass count, too."""
        self.rollout = None
        result = super().train(*args, **more)
        self.reach_milestones()
        return result

    def reach_milestones(self, kl_nats: float | None = None) -> None:
        """Keep the policies (their averages, if there is one) of the milestones that were passed."""
        with self.averaged():
            self.milestones.reach(self.state.global_step, kl_nats)

    def collect_rollout(self, index: int, prompts: Sequence[PromptIds]) -> Rollout:
        """Sample and score a rollout, and do what its KL decides."""
        self.score.center(self.models, self.schedule, self.args, self.sampling)
        rollout = collect(
            self.models,
            prompts,
            self.args,
            self.score,
            self.sampling,
            index=index,
            kl_coef=self.kl_control.coef,
            passes=self.passes_per_minibatch,
        )
        self.unlogged.add(rollout.metrics)
        n_responses = len(prompts) * self.args.samples_per_prompt
        kl_nats = rollout.metrics["objective/kl"]
        penalised_nats = rollout.metrics.get("objective/kl_averaged_reference", kl_nats)
        if self.kl_control.after_rollout(kl_nats, n_responses, penalised_nats):
            self.control.should_training_stop = True
        self.reach_milestones(kl_nats)
        interval = self.args.log_completions_steps
        if interval and rollout.index % max(1, interval // self.schedule.updates_per_rollout) == 0:
            rows = all_items(rollout.completions)
            if self.is_world_process_zero():
                folder, step = Path(str(self.args.output_dir)), self.state.global_step
                export.write_completions(rows, folder, step)
                records = export.some_completions(rows, step)
                export.append_completions(records, folder)
                log_table(self.callback_handler.callbacks, "completions", records, step)
        return rollout

    # -- one optimiser step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of one minibatch; the Trainer takes the optimiser step."""
        if self.rollout is None or self.rollout.index != inputs["rollout"]:
            self.rollout = self.collect_rollout(inputs["rollout"], inputs["prompts"])
            self.skips_updates = False
        if self.skips_updates:  # without gradients the optimiser changes nothing
            self.losses.add_loss(torch.zeros((), device=self.args.device))
            return torch.zeros((), device=self.args.device)
        started = time.perf_counter()
        minibatch = self.rollout.minibatches[inputs["minibatch"]]
        n_local = token_count(minibatch)
        self.spending.add(n_local)
        n_tokens = int(all_sum(torch.tensor(n_local, device=self.args.device)))
        critic_only = inputs["rollout"] < self.args.critic_warmup_rollouts
        update = Update(self.models, self.args, self.sampling.dtype, self.accelerator.backward, critic_only)
        sums = update.minibatch_gradients(minibatch, n_tokens)
        if self.args.ptx_coef and not critic_only:
            step = inputs["rollout"] * self.schedule.updates_per_rollout + inputs["update"]
            of_texts = update.ptx_gradients(self.data.ptx, step)
            self.spending.add(int(of_texts.ptx_tokens))
            sums += of_texts
        # The losses are divided by the tokens of all processes, so gradients add up; those of shards have already.
        reduce_gradients(self.models)
        sums = sums.over_processes(self.args.device)
        metrics = sums.metrics(n_tokens, has_critic=self.models.has_critic)
        metrics["speed/update_tokens_per_s"] = n_local / max(time.perf_counter() - started, 1e-9)
        if self.args.ptx_coef:
            metrics["loss/ptx"] = sums.ptx_loss
        if inputs["update"] == 0:
            metrics["policy/first_ratio_error"] = abs(metrics["policy/ratio"] - 1)
        self.unlogged.add(metrics)
        if self.args.target_kl is not None and metrics["policy/approx_kl"] > self.args.target_kl:
            self.skips_updates = True
        # The Trainer averages what the processes return.
        total = sums.policy_loss + self.args.vf_coef * sums.value_loss + self.args.ptx_coef * sums.ptx_loss
        loss = torch.tensor(total, device=self.args.device)
        self.losses.add_loss(loss)
        return loss

    # -- log, evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's entry, with the means of the metrics since the last one."""
        if "loss" in logs:
            logs["loss"] = self.losses.mean_loss(self.state.global_step)
        if "loss" in logs or "train_runtime" in logs:
            logs |= self.unlogged.take()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample each held-out prompt once and log score, KL to the reference, length and end-of-text rate."""
        prompts = list(eval_dataset) if eval_dataset is not None else list(self.data.eval_prompts)
        if not prompts:
            raise DataError("there is no prompt to evaluate on", where="eval_dataset", fix="give the trainer one")
        self.score.center(self.models, self.schedule, self.args, self.sampling)
        means = evaluate_policy(self.models, prompts, self.args, self.score, self.sampling)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints and export

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what :meth:`export` does, and the critic, if any, in ``critic/``.

        Into a checkpoint, for which the Trainer calls this itself, goes what training changes, in full precision. Where
        models are sharded, all processes call this.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if not _internal_call:
            if self.args.should_save or self.models.sharded:
                self.export(folder)
                self.models.save_critic(folder / "critic")
            return
        if self.models.sharded:
            self.save_shards(str(folder))
        if self.args.should_save:
            controls = checkpoint.Controls(self.kl_control.coef, self.score.mean, self.unlogged.values)
            checkpoint.save_checkpoint(folder, self.models, self.average, controls)
            if self.args.kl_milestones:
                self.milestones.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        controls = checkpoint.load_checkpoint(Path(resume_from_checkpoint), self.models, self.average)
        self.kl_control.restore(controls.kl_coef)
        if self.args.kl_milestones:
            self.milestones.load(Path(resume_from_checkpoint))
        self.score.mean, self.unlogged = controls.score_mean, MetricMeans(controls.unlogged)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the policy's weights are their average, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def export(self, folder: Path) -> None:
        """The policy (its average, if there is one) as a model or adapter of transformers and peft, with tokenizer and
        model card."""
        with self.averaged():
            self.export_as_it_is(folder)

    def export_as_it_is(self, folder: Path) -> None:
        """The same of the weights that are in place: a milestone's policy."""
        folder.mkdir(parents=True, exist_ok=True)
        self.models.save_policy(folder, self.sampling.tokenizer)
        rollouts = -(-self.state.global_step // self.schedule.updates_per_rollout)
        if main_process():
            export.write_card(folder, self.args, self.state.log_history, rollouts)


def _check_rewards_and_text(args: PPOConfig, rewards: Sequence[RewardFunction], data: TrainingData) -> None:
    if args.reward_weights and len(args.reward_weights) != len(rewards):
        raise RecipeError(
            f"{len(rewards)} rewards and {len(args.reward_weights)} weights", where="reward_weights", fix="one each"
        )
    if args.ptx_coef and not data.ptx:
        raise RecipeError("there is no text to mix in", where="ptx_coef", fix="give a ptx_dataset")


def _fit_to_rollouts(args: PPOConfig, schedule: Schedule) -> None:
    """Let the Trainer count in optimiser steps, and save where a rollout ends.

    Raises RecipeError where ``max_steps`` asks for more steps than the schedule has.
    """
    if args.max_steps <= 0:
        args.max_steps = len(schedule)
    if args.max_steps > len(schedule):
        raise RecipeError(
            f"max_steps is {args.max_steps}, and all episodes are done after {len(schedule)} optimiser steps",
            where="max_steps, total_episodes",
            fix="leave out one of them",
        )
    # Training cannot resume inside a rollout, whose samples no checkpoint holds.
    if args.save_strategy == "steps":
        interval = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps  # a share of all
        updates = schedule.updates_per_rollout
        args.save_steps = max(1, round(interval / updates)) * updates
    # Update divides a minibatch; the Trainer's accumulation would merge updates and add rollouts.
    args.gradient_accumulation_steps = 1
