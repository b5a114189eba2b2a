"""Settings of :class:`toolkit.ppo.PPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from toolkit.errors import RecipeError


@dataclass
class PPOConfig(TrainingArguments):
    """``TrainingArguments`` and what PPO adds.

    Names are those of TRL's last ``PPOConfig`` where the meaning is the same. Different here:
    ``per_device_train_batch_size`` counts the responses that a process samples in a rollout; ``missing_eos_penalty``
    *replaces* the score of a truncated response (so it is negative); ``num_mini_batches`` minibatches are each a real
    optimiser step; ``max_steps`` and ``save_steps`` count optimiser steps, and checkpoints fall on a rollout's end.
    ``gradient_accumulation_steps`` cuts a minibatch into about so many passes, which changes no number.

    Raises RecipeError where sizes do not divide.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Of the policy; about 10x and more for LoRA."})
    value_learning_rate: float | None = field(default=None, metadata={"help": "Of the critic; None: learning_rate."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "1e-8 makes early updates aggressive (N+, detail 5)."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Responses of a process in a rollout."})
    samples_per_prompt: int = field(default=1, metadata={"help": "Responses sampled for each prompt of a rollout."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Responses in all; None: num_train_epochs over the prompts."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps in each of these passes."})
    token_budget: int | None = field(
        default=None,
        metadata={"help": "Tokens of one forward and backward pass; None: 2,048 on a CPU, 4,096 on a GPU."},
    )

    response_length: int = field(default=53, metadata={"help": "Tokens of a response at most."})
    temperature: float = field(default=1.0, metadata={"help": "Of rollout, training and reference alike."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Prompts with more tokens are left out, and counted in a warning."}
    )
    stop_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Ids that end a response; None: all that tokenizer and model name."}
    )
    missing_eos_penalty: float | None = field(
        default=-1.0, metadata={"help": "Replaces the score of a truncated response; None keeps it."}
    )

    reward_weights: list[float] | None = field(default=None, metadata={"help": "Of several rewards; None: all 1."})
    reward_clip: float | None = field(default=10.0, metadata={"help": "Scores are clipped to +-this."})
    whiten_rewards: bool = field(default=False, metadata={"help": "To unit variance; their mean stays."})
    center_samples: int = field(
        default=0, metadata={"help": "Subtract the mean score of so many samples of the policy before training."}
    )

    kl_coef: float = field(default=0.05, metadata={"help": "beta of the per-token KL penalty in the reward."})
    kl_estimator: str = field(default="k1", metadata={"help": "In the reward: k1 or k3. Both are logged."})
    adaptive_kl: bool = field(default=False, metadata={"help": "Ziegler et al. 2019's controller of kl_coef."})
    adaptive_kl_target: float = field(default=6.0, metadata={"help": "Nats per response."})
    adaptive_kl_horizon: int = field(default=10_000, metadata={"help": "Responses."})
    target_kl: float | None = field(
        default=None, metadata={"help": "Skip a rollout's further updates when approx_kl passes this (nats per token)."}
    )
    max_kl: float | None = field(
        default=None, metadata={"help": "Stop when KL to the reference passes so many nats per response."}
    )
    kl_milestones: list[float] | None = field(
        default=None, metadata={"help": "Keep the policy when KL to the reference first passes each of these."}
    )

    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "lambda of GAE."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Over all tokens of all processes' rollouts."})
    cliprange: float = field(default=0.2, metadata={"help": "Of the ratio."})
    dual_clip: float | None = field(
        default=None, metadata={"help": "c > 1 bounds the loss of a negative advantage (Ye et al. 2020); None: off."}
    )
    cliprange_value: float = field(default=0.2, metadata={"help": "Of the value's step."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    share_trunk: bool = field(
        default=False, metadata={"help": "The critic is a head on the policy's own states instead of a model."}
    )
    value_head_init: str = field(
        default="zero", metadata={"help": "zero, or reward_model where the critic is a copy of it."}
    )
    critic_warmup_rollouts: int = field(default=0, metadata={"help": "First rollouts that train the critic alone."})
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the likelihood of ptx_dataset (InstructGPT)."})
    ptx_batch_size: int = field(default=8, metadata={"help": "Examples of ptx_dataset in an optimiser step."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Keep and export an average of the policy's weights; None: off."}
    )

    log_completions_steps: int | None = field(
        default=None, metadata={"help": "Write a table of completions every so many optimiser steps."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False
        batch, k, parts = self.per_device_train_batch_size, self.samples_per_prompt, self.num_mini_batches
        if batch % k or batch // k < parts:
            raise RecipeError(
                f"{batch} responses with {k} of each prompt do not fill {parts} minibatches of whole prompts",
                where="per_device_train_batch_size, samples_per_prompt, num_mini_batches",
                fix=f"a multiple of {k}, at least {k * parts}",
            )
        for name, instead in (
            ("load_best_model_at_end", "kl_milestones, or the policies of checkpoints"),
            ("push_to_hub", "save_model(folder), then huggingface_hub's upload_folder"),
        ):
            if getattr(self, name):
                raise RecipeError("a checkpoint holds what training changes alone", where=name, fix=instead)
        if self.kl_estimator not in ("k1", "k3"):
            raise RecipeError(f"there is no KL estimator {self.kl_estimator!r}", where="kl_estimator", fix="k1 or k3")
        if self.value_head_init not in ("zero", "reward_model"):
            raise RecipeError(
                f"there is no such start of a critic: {self.value_head_init!r}",
                where="value_head_init",
                fix="zero or reward_model",
            )
        if self.missing_eos_penalty is not None and self.missing_eos_penalty > 0:
            raise RecipeError(
                f"{self.missing_eos_penalty:g} would reward truncated responses: it takes their score's place",
                where="missing_eos_penalty",
                fix=f"{-self.missing_eos_penalty:g}, or None to keep their score (TRL subtracts it instead)",
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise RecipeError("the dual clip must lie above 1", where="dual_clip", fix="3, or None")
        for name, fits, fix in (
            ("temperature", self.temperature > 0, "above 0"),
            ("gamma", 0 <= self.gamma <= 1, "from 0 to 1"),
            ("lam", 0 <= self.lam <= 1, "from 0 to 1"),
            ("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "from 0 to below 1, or None"),
            ("kl_coef", self.kl_coef > 0 or not self.adaptive_kl, "above 0: adaptive_kl multiplies it"),
            ("fp16", not self.fp16, "bf16"),
        ):
            if not fits:
                raise RecipeError(f"{getattr(self, name)} does not work here", where=name, fix=fix)
        if self.fsdp or self.deepspeed:
            raise RecipeError(
                "every process holds the whole models here", where="fsdp, deepspeed", fix="leave it out; use LoRA"
            )
        if self.share_trunk and self.value_learning_rate not in (None, self.learning_rate):
            raise RecipeError(
                "a critic on the policy's own trunk has no learning rate of its own",
                where="share_trunk, value_learning_rate",
                fix="leave out one of them",
            )
