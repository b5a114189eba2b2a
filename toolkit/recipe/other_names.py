"""What other programs call duel's settings: TRL's PPOConfig and PPOTrainer of all versions, OpenRLHF's flags.

One table serves recipes (and ``--set``) and the arguments of :class:`toolkit.ppo.PPOConfig` and ``PPOTrainer``. A word
is looked up here only where it is no name of duel's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from toolkit.errors import RecipeError

T = TypeVar("T")


@dataclass(frozen=True)
class OtherName:
    """``setting`` is the key of a recipe: with a dot, the whole path; without, a key of the same section.

    ``python`` is the argument in Python where that is not the last part of ``setting``. ``note`` says what differs.
    """

    setting: str
    python: str = ""
    note: str = ""

    @property
    def elsewhere(self) -> bool:
        """Whether it is no key of the section that the word stands in."""
        return not self.setting or "." in self.setting

    def in_recipe(self) -> str:
        """Where it is set in a recipe.

        >>> OtherName("ppo.kl_coef", note="per token").in_recipe()
        'it is ppo.kl_coef here (per token)'
        """
        return f"it is {self.setting} here" + self._note if self.setting else self.note

    def in_python(self) -> str:
        """Where it is given in Python."""
        name = self.python or self.setting.rpartition(".")[2]
        return f"it is {name} here" + self._note if name else self.note

    @property
    def _note(self) -> str:
        return f" ({self.note})" if self.note else ""


_REFERENCE = OtherName("", "PPOTrainer(reference=...)", "the reference is the policy that training starts from: SFT's")
_REWARD = OtherName("reward_model.base", "PPOTrainer(reward=...)")
_RESPONSES = OtherName("ppo.per_device_train_batch_size", note="responses that each process samples in a rollout")
_BUDGET = OtherName("evaluate.token_budget", "token_budget", "tokens in a pass; it changes no number")
_EPISODES = OtherName("ppo.total_episodes", note="responses in all")
_STOP = OtherName("", "stop_token_ids", "the end of text of tokenizer and model ends a response: nothing is to be set")
_EVAL_SAMPLES = OtherName(
    "ppo.num_checkpoints",
    "log_completions_steps",
    "the checkpoints are evaluated, and their samples are in samples.parquet",
)
_UPDATES = OtherName("ppo.num_mini_batches", note="optimiser steps in an epoch of a rollout")
_REWARD_CLIP = OtherName("ppo.reward_clip", note="the largest absolute score")

OTHER_NAMES: Mapping[str, OtherName] = {
    # words that many programs use, in any section that has the setting
    "lr": OtherName("learning_rate"),
    "epochs": OtherName("num_train_epochs"),
    "batch_size": OtherName("per_device_train_batch_size"),
    "beta": OtherName("kl_coef"),
    "init_kl_coef": OtherName("kl_coef"),
    "ppo_epochs": OtherName("num_ppo_epochs"),
    "max_new_tokens": OtherName("response_length"),
    "max_completion_length": OtherName("max_response_tokens"),
    "max_length": OtherName("max_response_tokens"),
    "model_name_or_path": OtherName("name"),
    "torch_dtype": OtherName("dtype"),
    "peft": OtherName("lora"),
    "dataset": OtherName("source"),
    "loss": OtherName("loss_type"),
    "rank": OtherName("r"),
    "lora_alpha": OtherName("alpha"),
    # TRL's PPOConfig and PPOTrainer
    "ref_model": _REFERENCE,
    "ref_policy": _REFERENCE,
    "model_ref": _REFERENCE,
    "reward_model": OtherName("", "PPOTrainer(reward=...)"),
    "reward_model_path": _REWARD,
    "reward_fn": OtherName("", "PPOTrainer(reward=...)"),
    "reward_funcs": OtherName("", "PPOTrainer(reward=...)"),
    "sft_model_path": OtherName("model.name", "PPOTrainer(model=...)"),
    "policy": OtherName("model.name", "PPOTrainer(model=...)"),
    "tokenizer": OtherName("model.name", "processing_class", "the tokenizer comes with the model"),
    "config": OtherName("", "args"),
    "local_rollout_forward_batch_size": _BUDGET,
    "stop_token": _STOP,
    "stop_token_id": _STOP,
    "num_sample_generations": _EVAL_SAMPLES,
    "local_batch_size": _RESPONSES,
    "mini_batch_size": _UPDATES,
    "local_mini_batch_size": _UPDATES,
    "steps": _EPISODES,
    "adap_kl_ctrl": OtherName("ppo.adaptive_kl"),
    "target": OtherName("ppo.adaptive_kl_target"),
    "horizon": OtherName("ppo.adaptive_kl_horizon"),
    "kl_penalty": OtherName("ppo.kl_estimator", note="k1 or k3"),
    "score_clip": _REWARD_CLIP,
    "use_score_scaling": OtherName("ppo.whiten_rewards"),
    "use_score_norm": OtherName("ppo.whiten_rewards"),
    "whiten_advantage": OtherName("ppo.whiten_advantages"),
    "early_stopping": OtherName("ppo.target_kl", note="a KL that ends the epochs of a rollout"),
    "penalty_reward_value": OtherName("ppo.missing_eos_penalty", note="it replaces the score of unfinished text"),
    "non_eos_penalty": OtherName("ppo.missing_eos_penalty", note="it replaces the score of unfinished text"),
    "model_adapter_name": OtherName("", "PPOTrainer(model=a PeftModel)"),
    "ref_adapter_name": OtherName("", "PPOTrainer(reference=...)"),
    "ds3_gather_for_generation": OtherName("", note="there is no DeepSpeed here: leave it out"),
    "data_collator": OtherName("", note="prompts are text or messages, and need none: leave it out"),
    "optimizers": OtherName("", "optim"),
    "log_with": OtherName("", "report_to", "duel run writes metrics.jsonl"),
    "exp_name": OtherName("name", "run_name"),
    # OpenRLHF
    "pretrain": OtherName("model.name", "PPOTrainer(model=...)"),
    "reward_pretrain": _REWARD,
    "critic_pretrain": OtherName("ppo.value_head_init", "PPOTrainer(value_model=...)"),
    "remote_rm_url": OtherName("", "PPOTrainer(reward=...)", "a function can ask a server"),
    "actor_learning_rate": OtherName("ppo.learning_rate"),
    "critic_learning_rate": OtherName("ppo.value_learning_rate"),
    "kl_target": OtherName("ppo.adaptive_kl_target"),
    "kl_horizon": OtherName("ppo.adaptive_kl_horizon"),
    "rollout_batch_size": _RESPONSES,
    "micro_rollout_batch_size": _BUDGET,
    "micro_train_batch_size": _BUDGET,
    "train_batch_size": _UPDATES,
    "n_samples_per_prompt": OtherName("ppo.samples_per_prompt"),
    "prompt_max_len": OtherName("data.max_prompt_tokens", "max_prompt_length"),
    "generate_max_len": OtherName("ppo.response_length"),
    "max_len": OtherName("data.max_response_tokens", "response_length"),
    "max_samples": OtherName("data.train_prompts", "train_dataset", "give fewer rows"),
    "num_episodes": _EPISODES,
    "max_epochs": OtherName("ppo.num_ppo_epochs"),
    "eps_clip": OtherName("ppo.cliprange"),
    "value_clip": OtherName("ppo.cliprange_value"),
    "lambd": OtherName("ppo.lam"),
    "advantage_estimator": OtherName("ppo.advantage", note="gae or rloo"),
    "normalize_reward": OtherName("ppo.whiten_rewards"),
    "no_advantage_std_norm": OtherName("ppo.whiten_advantages", note="with the opposite sense"),
    "reward_clip_range": _REWARD_CLIP,
    "freezing_actor_steps": OtherName("ppo.critic_warmup_rollouts", note="in rollouts"),
    "ema_beta": OtherName("ppo.ema_decay"),
    "enable_ema": OtherName("ppo.ema_decay"),
    "prompt_data": OtherName("data.source", "train_dataset"),
    "input_key": OtherName("data.columns", "train_dataset", "its rows have a prompt"),
    "chosen_key": OtherName("data.columns", note="as in {chosen: NAME}"),
    "rejected_key": OtherName("data.columns", note="as in {rejected: NAME}"),
    "apply_chat_template": OtherName("data.conversational", "train_dataset", "messages are rendered"),
    "lora_rank": OtherName("model.lora.r", "peft_config"),
    "save_path": OtherName("", "output_dir", "duel run takes --out"),
    "flash_attn": OtherName("model.attn_implementation", "the model's attn_implementation"),
}


def explains_other_names(own: Iterable[str] = ()) -> Callable[[type[T]], type[T]]:
    """A class whose arguments may come by other programs' names: they raise a RecipeError that says duel's.

    ``own`` are names that the class takes although they are not in its signature.
    """

    def decorate(cls: type[T]) -> type[T]:
        make: Callable[..., None] = cls.__init__
        known = {*inspect.signature(make).parameters, *own}

        @functools.wraps(make)
        def init(self: Any, *args: Any, **values: Any) -> None:
            wrong = {name: OTHER_NAMES[name] for name in values if name not in known and name in OTHER_NAMES}
            if wrong:
                fix = "; ".join(f"{name}: {other.in_python()}" for name, other in wrong.items())
                raise RecipeError(f"{cls.__name__} has no {' and no '.join(wrong)}", where=cls.__name__, fix=fix)
            make(self, *args, **values)

        cls.__init__ = init  # type: ignore[method-assign]
        return cls

    return decorate
