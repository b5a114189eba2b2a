"""The sections of a recipe for the model and for what trains it: SFT, the reward model, both arms, and the baseline.

Field names follow TRL and transformers where the meaning is the same.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from toolkit.recipe.section import Fraction, Section


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021): the same for SFT, reward model, PPO and DPO."""

    r: PositiveInt = Field(16, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(32, description="Scale of the adapters: their update is multiplied by alpha / r.")
    target_modules: str | list[str] = Field("all-linear", description="Layers that get an adapter, by peft's names.")


class ModelSection(Section):
    name: str = Field(
        "smollm2-135m", description="Model to start from: tiny, smollm2-135m, a hub id, a local folder, or gguf:FILE."
    )
    revision: str | None = Field(None, description="Git revision of a model on the hub.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Precision of the forward passes. auto takes bfloat16 where this machine multiplies it fast (GPUs "
        "since Ampere, CPUs with AVX512-BF16 or AMX), and float32 elsewhere.",
    )
    lora: Lora | None = Field(default_factory=Lora, description="Adapters to train; null trains all weights.")
    chat_template: str | None = Field(None, description="Jinja file that replaces the tokenizer's chat template.")
    trust_remote_code: bool = Field(False, description="Run the Python code in models' folders: read it before.")
    attn_implementation: str | None = Field(
        None,
        description="Attention kernel: sdpa, eager or grouped. null takes grouped on a CPU, where it skips padding, "
        "and sdpa elsewhere. Training with grouped keeps heads x tokens^2 numbers of a row in memory: take sdpa for "
        "long rows.",
    )


class Training(Section):
    """What every training stage has. Names follow transformers.TrainingArguments."""

    learning_rate: PositiveFloat = Field(1e-4, description="Learning rate of AdamW at its peak.")
    num_train_epochs: PositiveFloat = Field(1.0, description="Passes over the training prompts.")
    max_steps: int = Field(
        -1, description="Number of optimiser steps, if positive; otherwise num_train_epochs decides."
    )
    per_device_train_batch_size: PositiveInt = Field(8, description="Prompts in a batch, for each process.")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Batches whose gradients are added up for one optimiser step."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the learning rate changes after the warm-up."
    )
    warmup_ratio: Fraction = Field(0.05, description="Share of the steps in which the learning rate rises to its peak.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Weight decay of AdamW.")
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients with a larger norm are scaled down to this norm.")
    adam_epsilon: PositiveFloat = Field(1e-8, description="Epsilon of AdamW.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations a second time in the backward pass: less memory, more time."
    )
    logging_steps: PositiveInt = Field(5, description="Optimiser steps between two entries of the log.")


class SftSection(Training):
    enabled: bool = Field(
        True, description="Fine-tune the model first; false starts both arms from the model as it is."
    )
    train_on: Literal["preferred", "all"] = Field(
        "preferred",
        description="Responses to imitate: the most preferred one of each prompt with a comparison, or all.",
    )
    learning_rate: PositiveFloat = Field(2e-4, description="Learning rate of AdamW at its peak.")


class RewardModelSection(Training):
    kind: Literal["preference", "process"] = Field(
        "preference",
        description="preference learns from the comparisons of the data; process learns from `steps` whether a step of "
        "a solution is right, and scores a response by its steps.",
    )
    steps: str | None = Field(
        None,
        description="Labelled steps for `kind: process`: a shipped name (arithmetic), a file, or a hub id, in TRL's "
        "stepwise format (prompt, completions, labels), as PRM800K or as Math-Shepherd. "
        "data.eval_fraction, data.train_prompts and data.eval_prompts count for its prompts as well.",
    )
    step_separator: str = Field(
        "\n", description="What stands between two steps of a response, for `kind: process`.", min_length=1
    )
    solution_score: Literal["min", "product", "last"] = Field(
        "min",
        description="A response's score by the probabilities that its steps are right: the least, their product, or "
        "the last one.",
    )
    trainer: Literal["engine", "trl"] = Field(
        "engine",
        description="engine computes all comparisons of a prompt at once; trl is TRL's RewardTrainer, on pairs.",
    )
    base: str | None = Field(
        None,
        description="Model to start from, with its own tokenizer: a decoder of another size or family, or an encoder "
        "(BERT style), which reads prompt and response as a pair. null takes the SFT policy.",
    )
    members: PositiveInt = Field(1, description="Reward models to train; several are an ensemble with one score.")
    differ_by: Literal["seed", "data", "head"] = Field(
        "seed",
        description="Where members differ: seed (new head, order of the data), data (a bootstrap sample of the prompts "
        "each), or head (heads on one shared trunk, the cheapest).",
    )
    combine: Literal["mean", "wco", "uwo", "average_weights"] = Field(
        "mean",
        description="What makes one score of the members' scores: their mean; wco, the least of them; uwo, the mean "
        "minus uwo_lambda times their variance (Coste et al. 2024). average_weights makes one model of them, with the "
        "mean of their weights (WARM, Rame et al. 2024).",
    )
    uwo_lambda: NonNegativeFloat = Field(0.5, description="Weight of the members' variance in combine: uwo.")
    annotators: Literal["pooled", "heads"] = Field(
        "pooled",
        description="pooled trains one score on all comparisons; heads trains a head for each annotator on a shared "
        "trunk.",
    )
    annotator: str | None = Field(
        None, description="With annotators: heads, the annotator whose head gives the score; null takes their mean."
    )
    center: bool = Field(True, description="Shift the scores so that SFT samples for training prompts have mean 0.")
    center_rewards_coefficient: NonNegativeFloat = Field(
        0.0, description="Weight of an auxiliary loss (r_i + r_j)^2, which keeps scores near 0."
    )


class Arm(Training):
    """What both arms have by construction: schedule, clipping, checkpoints."""

    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the learning rate changes after the warm-up."
    )
    warmup_ratio: Fraction = Field(0.1, description="Share of the steps in which the learning rate rises to its peak.")
    num_checkpoints: PositiveInt = Field(
        3, description="Number of policies along training that are evaluated, the last one included."
    )
    train_tokens: PositiveInt | None = Field(
        None,
        description="Train until this many response tokens were trained on, each pass counting; takes the place of "
        "total_episodes (PPO) or num_train_epochs (DPO). The reward model's training counts to PPO.",
    )
    train_seconds: PositiveFloat | None = Field(
        None, description="The same in seconds of wall time, from the beginning of the arm's stage."
    )
    kl_milestones: list[PositiveFloat] | None = Field(
        None,
        description="Keep a policy at each of these KLs to the reference (nats per response): between the last two "
        "measured policies, the point whose KL on 128 samples is nearest. PPO measures the KL of each rollout, DPO "
        "every logging_steps.",
    )


class PpoSection(Arm):
    """PPO's settings. ``toolkit.ppo.PPOConfig`` takes the words and ranges of those that it has too from here."""

    learning_rate: PositiveFloat = Field(
        1e-4,
        description="Learning rate of the policy at its peak: 1e-6 to 3e-6 for all weights, about ten times more for "
        "LoRA.",
    )
    value_learning_rate: PositiveFloat | None = Field(
        None, description="Learning rate of the critic at its peak; null takes learning_rate."
    )
    adam_epsilon: PositiveFloat = Field(
        1e-5, description="Epsilon of AdamW; 1e-8 makes early updates aggressive (Huang et al. 2024, detail 5)."
    )
    per_device_train_batch_size: PositiveInt = Field(
        64, description="Responses that each process samples in a rollout."
    )
    samples_per_prompt: PositiveInt = Field(4, description="Responses sampled for each prompt of a rollout.")
    total_episodes: PositiveInt = Field(1024, description="Responses sampled in the whole training.")
    num_ppo_epochs: PositiveInt = Field(2, description="Passes over each rollout.")
    num_mini_batches: PositiveInt = Field(2, description="Optimiser steps in each pass over a rollout.")
    kl_coef: NonNegativeFloat = Field(0.05, description="Weight beta of the per-token KL penalty in the reward.")
    kl_estimator: Literal["k1", "k3"] = Field(
        "k1", description="Estimator of that penalty: k1 is unbiased, k3 is never negative (Schulman 2020)."
    )
    adaptive_kl: bool = Field(
        False, description="Change kl_coef after each rollout to bring the KL to its target (Ziegler et al. 2019)."
    )
    adaptive_kl_target: PositiveFloat = Field(6.0, description="Target of adaptive_kl, in nats per response.")
    adaptive_kl_horizon: PositiveInt = Field(
        10_000, description="Horizon of adaptive_kl, in responses; a longer one changes kl_coef more slowly."
    )
    reward: Literal["reward_model", "ensemble", "length"] = Field(
        "reward_model",
        description="What PPO optimises: reward_model, the reward model's score; ensemble, the same, which must have "
        "members or heads (reward_model.combine); or, as a control, length, the response's length alone: "
        "1 - |tokens / target_length - 1| (Singhal et al. 2023).",
    )
    reward_shape: Literal["score", "steps"] = Field(
        "score",
        description="Where a process reward model's reward is given: score gives the solution score at the end of a "
        "response; steps gives each step, at the token that closes it, the change that it makes in the solution score. "
        "Both add up to the same.",
    )
    target_length: PositiveInt | None = Field(
        None,
        description="Tokens of a response that `reward: length` aims at; null takes the mean length of the preferred "
        "responses of the training data.",
    )
    prompts: str | None = Field(
        None,
        description="Further prompts without labels to sample from, beside those of the training data: preference "
        "data, rows with a `prompt` (JSON lines, CSV, Parquet), or a .txt file with a prompt in each line.",
    )
    advantage: Literal["gae", "rloo"] = Field(
        "gae",
        description="gae estimates advantages with a critic. rloo trains no critic: a response's reward is compared "
        "with the mean of the prompt's other samples (Ahmadian et al. 2024). It ignores gamma, lam, vf_coef, "
        "cliprange_value, value_learning_rate and value_head_init.",
    )
    gamma: Fraction = Field(1.0, description="Discount of later rewards.")
    lam: Fraction = Field(0.95, description="lambda of generalised advantage estimation.")
    cliprange: PositiveFloat = Field(0.2, description="The policy's ratio is clipped to 1 +- this.")
    cliprange_value: PositiveFloat = Field(0.2, description="The change of a value is clipped to +- this.")
    vf_coef: NonNegativeFloat = Field(0.1, description="Weight of the critic's loss.")
    whiten_rewards: bool = Field(False, description="Divide rewards by their standard deviation; their mean stays.")
    whiten_advantages: bool = Field(
        True, description="Scale the advantages of a rollout (of all processes) to mean 0 and standard deviation 1."
    )
    reward_clip: PositiveFloat | None = Field(10.0, description="Scores are clipped to +- this; null does not clip.")
    missing_eos_penalty: float | None = Field(
        None,
        le=0.0,
        description="Replaces the score of a truncated response; null keeps the score. DPO has no counterpart, so a "
        "number helps PPO alone wherever the judge dislikes truncated text.",
    )
    response_length: PositiveInt | None = Field(
        None, description="Longest response, in tokens; in a recipe null takes data.max_response_tokens."
    )
    temperature: PositiveFloat = Field(
        1.0, description="Temperature of sampling; training divides the logits of policy and reference by it as well."
    )
    value_head_init: Literal["reward_model", "zero"] = Field(
        "zero",
        description="Start of the critic's head: zero, or reward_model, which keeps the reward model's head where the "
        "critic is a copy of that model.",
    )
    share_trunk: bool = Field(
        False, description="Make the critic a head on the policy's hidden states instead of a second model."
    )
    target_kl: PositiveFloat | None = Field(
        None, description="Skip a rollout's remaining updates when approx_kl exceeds this (nats per token)."
    )
    max_kl: PositiveFloat | None = Field(
        None, description="Stop training when the KL to the reference exceeds this (nats per response)."
    )
    dual_clip: Annotated[float, Field(gt=1.0)] | None = Field(
        None,
        description="Bound c on the loss of tokens with a negative advantage (Ye et al. 2020), 3 for instance; null "
        "sets no bound.",
    )
    critic_warmup_rollouts: NonNegativeInt = Field(
        0, description="Number of rollouts at the start that train the critic alone."
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None,
        description="Decay of an average of the policy's weights, which is then the exported policy; null keeps no "
        "average.",
    )
    reference_decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None,
        description="Let the reference of the KL penalty follow the policy: after each rollout's updates it becomes "
        "this share of itself and the rest of the policy (Xu et al. 2024), 0.99 for instance; null keeps it. "
        "`objective/kl` and all KL figures stay those to the policy that training started from.",
    )
    ptx_coef: NonNegativeFloat = Field(
        0.0,
        description="Weight of the negative log-likelihood, in nats per token, of other text in the policy's loss "
        "(Ouyang et al. 2022, equation 2); 0 mixes none in.",
    )
    ptx_batch_size: PositiveInt = Field(8, description="Texts whose likelihood counts in an optimiser step.")
    ptx_texts: str | None = Field(
        None,
        description="Source of the texts of ptx_coef: rows with a `text`, rows with `prompt` and `completion`, "
        "preference data, or a .txt file with a text in each line. null takes the responses that SFT imitates. "
        "Held-out prompts and their groups are left out.",
    )
    log_completions_steps: PositiveInt | None = Field(
        None,
        description="Every so many optimiser steps, write the completions of a few prompts of the rollout with score "
        "and KL to completions.jsonl, and to the trackers; null writes none.",
    )


class OnlineSection(Section):
    """Comparisons of the policy's own samples in the place of the data's (Guo et al. 2024)."""

    labels: str = Field(
        "rm",
        description="What scores the samples: rm (the run's reward model), rm:MODEL, gold, or python:module:function. "
        "`dpo.online: null`, the default, trains on the comparisons of the data.",
    )
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(
        2, description="Responses sampled for each prompt of a batch; every two with unequal scores are compared."
    )


class DpoSection(Arm):
    learning_rate: PositiveFloat = Field(1e-4, description="Learning rate of AdamW at its peak.")
    trainer: Literal["engine", "trl"] = Field(
        "engine",
        description="engine computes all comparisons of a prompt at once; trl is TRL's DPOTrainer, on pairs.",
    )
    beta: PositiveFloat = Field(0.1, description="Scale of the implicit reward beta * log(pi / pi_ref).")
    loss_type: Literal[
        "sigmoid",
        "sigmoid_norm",
        "ipo",
        "hinge",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
    ] = Field("sigmoid", description="Loss of a pair, by TRL's names; those after robust need `trainer: trl`.")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="Assumed share of wrong labels, for sigmoid (conservative DPO), robust and exo_pair."
    )
    online: OnlineSection | None = Field(
        None,
        description="Train on comparisons of responses that the current policy samples (online DPO, Guo et al. 2024); "
        "null trains on those of the data. `{}` takes the defaults.",
    )


class RftSection(Training):
    """A baseline beside both arms: SFT goes on with the best of n of its samples by the reward model.

    Rejection-sampling fine-tuning: Touvron et al. 2023 (arXiv 2307.09288), section 3.2.3; Dong et al. 2023 (RAFT, arXiv
    2304.06767).
    """

    n: Annotated[int, Field(ge=2)] = Field(4, description="Samples of SFT for a training prompt; the best one is kept.")
    prompts: PositiveInt | None = Field(None, description="Training prompts to sample for; null takes all of them.")
    temperature: PositiveFloat = Field(1.0, description="Temperature of these samples.")
