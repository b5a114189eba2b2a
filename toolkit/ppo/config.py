"""Settings of :class:`toolkit.ppo.PPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import ValidationError
from transformers import TrainingArguments

from toolkit.errors import RecipeError
from toolkit.recipe.other_names import explains_other_names
from toolkit.recipe.ppo_conflicts import ppo_conflicts
from toolkit.recipe.problems import allowed
from toolkit.recipe.training import PpoSection


def _shared(name: str, default: Any) -> Any:
    """A setting that recipes have too: its help is the recipe's description, with Python's None for null."""
    text = PpoSection.model_fields[name].description or ""
    return field(default=default, metadata={"help": text.replace("null", "None")})


@explains_other_names()
@dataclass
class PPOConfig(TrainingArguments):
    """``TrainingArguments`` and what PPO adds.

    Names are those of TRL's last ``PPOConfig`` where the meaning is the same. These mean something else here:
    ``per_device_train_batch_size`` counts the responses that a process samples in a rollout; ``missing_eos_penalty``
    *replaces* the score of a truncated response (so it is negative); ``num_mini_batches`` minibatches are each a real
    optimiser step; ``max_steps`` and ``save_steps`` count optimiser steps, and checkpoints fall on a rollout's end.
    ``gradient_accumulation_steps`` cuts a minibatch into about this many passes, which changes no number.

    Raises RecipeError for a value out of its range and for settings that exclude each other.
    """

    learning_rate: float = _shared("learning_rate", 3e-6)
    value_learning_rate: float | None = _shared("value_learning_rate", None)
    adam_epsilon: float = _shared("adam_epsilon", 1e-5)
    per_device_train_batch_size: int = _shared("per_device_train_batch_size", 64)
    samples_per_prompt: int = _shared("samples_per_prompt", 1)
    # None: as many as num_train_epochs passes over the prompts give.
    total_episodes: int | None = _shared("total_episodes", None)
    num_ppo_epochs: int = _shared("num_ppo_epochs", 4)
    num_mini_batches: int = _shared("num_mini_batches", 1)
    token_budget: int | None = field(
        default=None,
        metadata={"help": "Most tokens in one forward and backward pass; None: 2,048 on a CPU, 4,096 on a GPU."},
    )

    response_length: int = _shared("response_length", 53)
    temperature: float = _shared("temperature", 1.0)
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Prompts with more tokens are left out, and counted in a warning."}
    )
    stop_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Ids that end a response; None: all that tokenizer and model name."}
    )
    missing_eos_penalty: float | None = _shared("missing_eos_penalty", -1.0)

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several rewards, one each; None: all are 1."}
    )
    reward_shape: str = _shared("reward_shape", "score")
    reward_clip: float | None = _shared("reward_clip", 10.0)
    whiten_rewards: bool = _shared("whiten_rewards", False)
    center_samples: int = field(
        default=0,
        metadata={"help": "Subtract the mean score of this many samples, drawn from the policy before training."},
    )

    kl_coef: float = _shared("kl_coef", 0.05)
    kl_estimator: str = _shared("kl_estimator", "k1")
    adaptive_kl: bool = _shared("adaptive_kl", False)
    adaptive_kl_target: float = _shared("adaptive_kl_target", 6.0)
    adaptive_kl_horizon: int = _shared("adaptive_kl_horizon", 10_000)
    target_kl: float | None = _shared("target_kl", None)
    max_kl: float | None = _shared("max_kl", None)
    kl_milestones: list[float] | None = _shared("kl_milestones", None)

    advantage: str = _shared("advantage", "gae")
    gamma: float = _shared("gamma", 1.0)
    lam: float = _shared("lam", 0.95)
    whiten_advantages: bool = _shared("whiten_advantages", True)
    cliprange: float = _shared("cliprange", 0.2)
    dual_clip: float | None = _shared("dual_clip", None)
    cliprange_value: float = _shared("cliprange_value", 0.2)
    vf_coef: float = _shared("vf_coef", 0.1)
    share_trunk: bool = _shared("share_trunk", False)
    value_head_init: str = _shared("value_head_init", "zero")
    critic_warmup_rollouts: int = _shared("critic_warmup_rollouts", 0)
    ptx_coef: float = _shared("ptx_coef", 0.0)
    ptx_batch_size: int = _shared("ptx_batch_size", 8)
    ema_decay: float | None = _shared("ema_decay", None)
    reference_decay: float | None = _shared("reference_decay", None)

    log_completions_steps: int | None = _shared("log_completions_steps", None)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.remove_unused_columns = False
        _check_unsupported(self)
        _check_ranges(self)
        for conflict in ppo_conflicts(PpoSection.model_construct(**_shared_values(self))):
            raise RecipeError(conflict.what, where=", ".join(conflict.names), fix=conflict.fix)


# Settings that a recipe's section has too. Equal names mean equal things.
SHARED_SETTINGS = frozenset(PpoSection.model_fields.keys() & PPOConfig.__annotations__.keys())

# Settings that must lie in the recipe's range. The others may leave it: a rate of 0 keeps a model as it is, and None
# for total_episodes counts epochs.
_IN_RANGE = (
    "temperature",
    "gamma",
    "lam",
    "ema_decay",
    "reference_decay",
    "ptx_coef",
    "ptx_batch_size",
    "log_completions_steps",
    "dual_clip",
    "missing_eos_penalty",
    "kl_estimator",
    "advantage",
    "value_head_init",
    "reward_shape",
)

_PARTIAL_CHECKPOINT = "a checkpoint holds only the weights that training changes"
_WHOLE_MODELS = "every process holds the whole models here"
# Parts of TrainingArguments that PPO does not have: name, why, what to do instead.
_UNSUPPORTED = (
    ("load_best_model_at_end", _PARTIAL_CHECKPOINT, "kl_milestones, or the policies of checkpoints"),
    ("push_to_hub", _PARTIAL_CHECKPOINT, "save_model(folder), then huggingface_hub's upload_folder"),
    ("fsdp", _WHOLE_MODELS, "leave it out; use LoRA, or a recipe, which trains under FSDP2 (duel run)"),
    ("deepspeed", _WHOLE_MODELS, "leave it out; use LoRA"),
    ("fp16", "PPO trains in fp32 or bf16", "bf16"),
)


def _shared_values(args: PPOConfig) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SHARED_SETTINGS}


def _check_unsupported(args: PPOConfig) -> None:
    for name, what, fix in _UNSUPPORTED:
        if getattr(args, name):
            raise RecipeError(what, where=name, fix=fix)


def _check_ranges(args: PPOConfig) -> None:
    penalty = args.missing_eos_penalty
    if penalty is not None and penalty > 0:
        raise RecipeError(
            f"{penalty:g} would reward truncated responses, since it replaces their score",
            where="missing_eos_penalty",
            fix=f"{-penalty:g}, or None to keep their score (TRL subtracts it instead)",
        )
    try:
        PpoSection.model_validate({name: getattr(args, name) for name in _IN_RANGE})
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        takes = allowed(PpoSection.model_json_schema()["properties"][name]).replace("null", "None")
        default = next(f.default for f in fields(args) if f.name == name)
        raise RecipeError(
            f"{name} must be {takes}, not {getattr(args, name)!r}", where=name, fix=f"the default is {default!r}"
        ) from None
