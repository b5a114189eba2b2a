"""From names, folders and loaded models to PPO's models and reward functions, for a run and for ``PPOTrainer``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from toolkit.engine.engine import Engine
from toolkit.engine.fast import adapters, speedups
from toolkit.engine.logps import score_head
from toolkit.engine.reward_model import load_scorer
from toolkit.errors import ModelError, RecipeError
from toolkit.models.files import ADAPTER_CONFIG, model_json
from toolkit.models.inspect import backbone, disable_dropout, inner, torch_dtype
from toolkit.models.load import adapter_weights, load_policy, load_reward_model, trainable
from toolkit.models.merged import merged
from toolkit.models.resolve import ModelRef, resolve, resolve_base
from toolkit.models.reward_head import RewardHead, reward_head
from toolkit.models.sharding import loading_device
from toolkit.models.tokenizer import check_vocabulary, load_tokenizer, reads_the_same
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.models import OF_BASE, POLICY, SCORE_WEIGHT, AdapterModels, PPOModels, SeparateModels, linear_head
from toolkit.ppo.process import RewardShape, shape_of
from toolkit.ppo.rewards import (
    Ensemble,
    RewardFunction,
    adapter_reward,
    model_reward,
    reward_functions,
)
from toolkit.recipe.training import ModelSection

# Ways to start an adapter that subtract from the base what they put into the adapter.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")


def is_low_rank_on(policy: Any, base: ModelRef, reward: ModelRef) -> bool:
    """Whether a reward model can be an adapter on ``base`` beside the one of the policy, which is on it: it was trained
    on exactly these weights, and is LoRA of their layers with the head ``score``, and nothing else.

    Tokens or modules that it trained in full would change what the policy computes, or be lost.
    """
    if reward.kind != "adapter" or resolve_base(Path(reward.path)).fingerprint != base.fingerprint:
        return False
    config = model_json(Path(reward.path) / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        return False
    layers = {f"{OF_BASE}{name}": layer for name, layer in inner(policy).named_modules()}
    weights = adapter_weights(reward)
    return SCORE_WEIGHT in weights and all(
        name == SCORE_WEIGHT or _is_of_layer(name, weight, layers) for name, weight in weights.items()
    )


def _is_of_layer(name: str, weight: torch.Tensor, layers: Mapping[str, torch.nn.Module]) -> bool:
    """Whether a weight of an adapter is low-rank, or the frozen embedding below such weights, which peft saves."""
    layer, below, _ = name.partition(".base_layer.")
    if below:
        return layer in layers and weight.shape == layers[layer].weight.shape
    return adapters.is_adapter_weight(name) and name.partition(".lora_")[0] in layers


# -- for a run


def models_of_run(
    sft: ModelRef,
    reward: ModelRef,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    value_head_init: str,
    share_trunk: bool = False,
    with_critic: bool = True,
    reward_shape: RewardShape = "score",
    previous: ModelRef | None = None,
) -> tuple[PPOModels, RewardFunction]:
    """The models of a run and its reward function. The policy starts from ``sft``, or goes on from ``previous``, a
    policy that started there; ``sft`` is the reference. The critic, if any, starts from ``reward``.

    With adapters to train, the models share one base with those rewards that are adapters on it. A critic cannot start
    from a reward model of another architecture or with another tokenizer, and starts from the policy then; one beside
    an ensemble starts from its first member.
    """
    dtype, pad_id, device = torch_dtype(section.dtype), int(tokenizer.pad_token_id), loading_device()
    # The reference has the policy's precision, so that the KL between two equal models is 0.
    weights_dtype = None if section.lora else torch.float32
    head, members = reward_head(reward.path), members_of(reward)
    check_critic_head(head, value_head_init)
    loaded: Any = load_policy(previous or sft, section, dtype=weights_dtype)
    policy = trainable(loaded.to(device), section.lora, task="CAUSAL_LM")
    on_policy = all(is_low_rank_on(policy, sft, member) for member in members)
    first = None if on_policy else _as_critic(members[0], policy, tokenizer, section)
    if section.lora is not None and (on_policy or first is None or len(members) > 1):
        models = AdapterModels(
            policy,
            engine=Engine(policy, pad_id, dtype=dtype),
            rewards=members if on_policy else (),
            value_shift=reward_head(members[0].path).mean,
            value_head_init=value_head_init,
            share_trunk=share_trunk,
            with_critic=with_critic,
            base_is_reference=True,
        )
        models.base = sft
        if on_policy:
            return models, adapter_reward(models, head, tokenizer, reward_shape)
        return models, _by_itself(reward, section, tokenizer, reward_shape)[0]
    reference: Any = load_policy(sft, section, dtype=weights_dtype)
    needs_critic = with_critic and not share_trunk
    if first is None and on_policy:
        first = _as_critic(members[0], policy, tokenizer, section)
    function, reward_engines = _by_itself(reward, section, tokenizer, reward_shape)
    separate = SeparateModels(
        policy,
        reference.to(device),
        (first or new_critic(policy)) if needs_critic else None,
        pad_id=pad_id,
        dtype=dtype,
        value_head_init=value_head_init if first is not None else "zero",
        value_shift=reward_head(members[0].path).mean,
        with_critic=with_critic,
        reward_engines=reward_engines,
    )
    separate.base = sft
    return separate, function


def members_of(reward: ModelRef) -> list[ModelRef]:
    """The members of an ensemble, or the reward model by itself."""
    names = reward_head(reward.path).members
    return [resolve(str(Path(reward.path) / name)) for name in names] or [reward]


def check_critic_head(head: RewardHead, value_head_init: str) -> None:
    """Raises RecipeError for a critic that would start from the head of a process reward model."""
    if head.process is not None and value_head_init == "reward_model":
        raise RecipeError(
            "the head of a process reward model gives logits of steps, which are no values of states",
            where="value_head_init",
            fix="zero",
        )


def _by_itself(
    reward: ModelRef, section: ModelSection, tokenizer: PreTrainedTokenizerBase, shape: RewardShape
) -> tuple[RewardFunction, Sequence[Engine]]:
    """The scores of a reward model in memory of its own, and what computes them."""
    reads = load_tokenizer(reward)
    model = load_scorer(reward, section, reads, device=loading_device())
    return model_reward(model, reads, tokenizer, shape), model.engines


def _as_critic(reward: ModelRef, policy: Any, tokenizer: PreTrainedTokenizerBase, section: ModelSection) -> Any | None:
    """The reward model as a critic that reads the policy's tokens; None where it cannot be one."""
    if load_tokenizer(reward).get_vocab() != tokenizer.get_vocab():
        return None
    model: Any = load_reward_model(reward, section)
    if not same_architecture(model, policy):
        return None
    model = merged(model)
    if model.score.out_features > 1:  # heads of several annotators: the critic's is their mean
        model.score, model.config.num_labels = linear_head(model.score.weight.mean(0, keepdim=True)), 1
    return model.to(loading_device())


def same_architecture(model: Any, policy: Any) -> bool:
    """Whether a sequence classifier is the policy with a linear score in the place of its unembedding."""
    same_type = inner(model).config.model_type == inner(policy).config.model_type
    return bool(same_type and isinstance(score_head(model), torch.nn.Linear))


# -- for PPOTrainer


@dataclass(frozen=True)
class TrainerModels:
    """The models that ``PPOTrainer`` was called with; its docstring says what each may be."""

    model: Any
    reward: Any
    tokenizer: PreTrainedTokenizerBase | None
    value_model: Any
    reference: Any
    peft_config: LoraConfig | None
    reward_tokenizers: Sequence[PreTrainedTokenizerBase | None] | None

    @property
    def reward_tokenizer(self) -> PreTrainedTokenizerBase | None:
        return (self.reward_tokenizers or [None])[0]


@dataclass(frozen=True)
class Assembled:
    models: PPOModels
    rewards: list[RewardFunction]
    tokenizer: PreTrainedTokenizerBase


def assemble(inputs: TrainerModels, args: PPOConfig) -> Assembled:
    """Load and join what ``PPOTrainer`` needs.

    Raises RecipeError or ModelError for models that cannot be trained like this; the message says why.
    """
    policy, policy_ref = _load_policy(inputs, args)
    tokenizer = inputs.tokenizer or load_tokenizer(policy_ref or resolve(str(inner(policy).config.name_or_path)))
    policy = policy.to(args.device)
    check_adapters(policy, inputs.peft_config)
    check_vocabulary(policy.get_input_embeddings().weight.shape[0], tokenizer, str(tokenizer.name_or_path))
    reward_adapter = _shared_reward_adapter(inputs, policy, policy_ref, tokenizer)
    rewards = []
    if reward_adapter is None:
        section = ModelSection(dtype=_dtype_name(args))
        rewards = reward_functions(
            inputs.reward,
            tokenizer,
            section,
            args.device,
            tokenizers=inputs.reward_tokenizers,
            shape=shape_of(args.reward_shape),
        )
    models = _ppo_models(inputs, args, policy, tokenizer, reward_adapter)
    if policy_ref is not None:
        models.base = resolve_base(Path(policy_ref.path)) if policy_ref.kind == "adapter" else policy_ref
    if reward_adapter is not None:
        assert isinstance(models, AdapterModels)
        head = reward_head(reward_adapter.path)
        rewards = [adapter_reward(models, head, tokenizer, shape_of(args.reward_shape))]
    return Assembled(models, rewards, tokenizer)


def _dtype_name(args: PPOConfig) -> Any:
    return "bfloat16" if args.bf16 else "float32"


def _load_policy(inputs: TrainerModels, args: PPOConfig) -> tuple[Any, ModelRef | None]:
    """The policy without dropout, and what its name resolved to; None for a model that was loaded already."""
    if not isinstance(inputs.model, str):
        return disable_dropout(inputs.model), None
    ref = resolve(inputs.model)
    adapted = inputs.peft_config is not None or ref.kind == "adapter"
    # Weights that train stay in fp32: autocast lowers the precision of products, not of weights.
    return load_policy(ref, ModelSection(dtype=_dtype_name(args) if adapted else "float32")), ref


def check_adapters(policy: Any, peft_config: Any) -> None:
    """Raises RecipeError for an adapter that PPO cannot train, or cannot train beside another."""
    if isinstance(policy, PeftModel) and peft_config is not None:
        raise RecipeError(
            "the model has an adapter already, and peft_config asks for another",
            where="peft_config",
            fix="leave it out to go on training the adapter, or merge it first (model.merge_and_unload())",
        )
    if isinstance(policy, PeftModel) and POLICY not in policy.peft_config:
        raise RecipeError(
            f"the model's adapter is named {', '.join(policy.peft_config)}",
            where="model",
            fix=f"load it under peft's default name, {POLICY}",
        )
    for config in policy.peft_config.values() if isinstance(policy, PeftModel) else ():
        _check_adapter_config(config)
    if peft_config is not None:
        _check_adapter_config(peft_config)
        start = str(getattr(peft_config, "init_lora_weights", True))
        if start.startswith(CHANGE_THE_BASE):
            raise RecipeError(
                f"{start} changes the weights below the adapter, which is then no adapter on the model that you named",
                where="peft_config.init_lora_weights",
                fix="True, or gaussian",
            )
        if not isinstance(peft_config, LoraConfig):
            raise RecipeError(f"{type(peft_config).__name__} is not supported", where="peft_config", fix="LoraConfig")


def _check_adapter_config(config: Any) -> None:
    if getattr(config, "bias", "none") != "none":
        raise RecipeError(
            "policy and reference would share the biases that the adapter trains",
            where="peft_config",
            fix='bias="none"',
        )
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            raise RecipeError(
                "PPO trains only the low-rank weights of an adapter", where=f"peft_config.{name}", fix="leave it out"
            )


def _shared_reward_adapter(
    inputs: TrainerModels, policy: Any, policy_ref: ModelRef | None, tokenizer: PreTrainedTokenizerBase
) -> ModelRef | None:
    """The reward model where it can share the policy's base, and reads the tokens that the policy writes."""
    if policy_ref is None or inputs.peft_config is None or not isinstance(inputs.reward, str):
        return None
    if inputs.value_model is not None or inputs.reference is not None:
        return None
    reward_ref = resolve(inputs.reward)
    if not is_low_rank_on(policy, policy_ref, reward_ref):
        return None
    same_tokens = reads_the_same(inputs.reward_tokenizer or load_tokenizer(reward_ref), tokenizer)
    return reward_ref if same_tokens else None


def _ppo_models(
    inputs: TrainerModels,
    args: PPOConfig,
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    reward_adapter: ModelRef | None,
) -> PPOModels:
    """Adapters on one base where these suffice, and separate models otherwise."""
    dtype, pad_id = torch_dtype(_dtype_name(args)), int(tokenizer.pad_token_id)
    if inputs.reference is not None and args.reference_decay is not None:
        raise RecipeError(
            "an averaged reference starts as the policy, and another one is named",
            where="reference, reference_decay",
            fix="leave out one",
        )
    named_critic = _named_critic(inputs, args)
    policy = _make_trainable(policy, inputs.peft_config)
    if isinstance(policy, PeftModel) and named_critic is None and inputs.reference is None:
        return AdapterModels(
            policy,
            engine=Engine(policy, pad_id, dtype=dtype),
            rewards=[reward_adapter] if reward_adapter else [],
            value_shift=reward_head(reward_adapter.path).mean if reward_adapter else 0.0,
            value_head_init=args.value_head_init,
            share_trunk=args.share_trunk,
            with_critic=args.advantage == "gae",
        )
    reference = _frozen_reference(inputs.reference, policy).to(args.device)
    if args.share_trunk or args.advantage == "rloo":
        critic = Critic(None)
    else:
        critic = named_critic or _critic_from_reward(inputs, args, policy, tokenizer) or Critic(new_critic(policy))
    return SeparateModels(
        policy,
        reference,
        critic.model,
        pad_id=pad_id,
        dtype=dtype,
        value_head_init=critic.value_head_init,
        value_shift=critic.value_shift,
        with_critic=args.advantage == "gae",
    )


def _make_trainable(policy: Any, peft_config: LoraConfig | None) -> Any:
    """The policy with a trainable adapter on frozen weights, or with all weights trainable. What trains is in fp32."""
    if peft_config is not None:
        config = copy.deepcopy(peft_config)
        config.lora_dropout, config.task_type = 0.0, "CAUSAL_LM"
        policy = get_peft_model(policy, config)
    if not isinstance(policy, PeftModel):
        return policy.float().requires_grad_(True)
    speedups.install(policy)
    for name, weight in policy.named_parameters():
        weight.requires_grad_(adapters.is_adapter_weight(name))
        if weight.requires_grad:
            weight.data = weight.data.float()
    return policy


def _frozen_reference(reference: Any, policy: Any) -> Any:
    """The named reference, or else a copy of the policy as it is now."""
    if reference is None:
        reference = copy.deepcopy(policy)
    elif isinstance(reference, str):
        # In the policy's precision, so that the KL between two equal models is 0.
        dtype = next(backbone(policy).parameters()).dtype
        reference = load_policy(resolve(reference), ModelSection(), dtype=dtype)
    return disable_dropout(reference).eval()


# -- the critic


@dataclass(frozen=True)
class Critic:
    """What a critic starts from: a sequence classifier, or None for a head on the policy's trunk."""

    model: Any
    value_head_init: str = "zero"
    value_shift: float = 0.0


def _named_critic(inputs: TrainerModels, args: PPOConfig) -> Critic | None:
    """The critic that the user named as ``value_model``, with its head."""
    value_model, shift = inputs.value_model, 0.0
    if value_model is None:
        return None
    if args.advantage == "rloo":
        raise RecipeError("rloo trains without a critic", where="advantage, value_model", fix="leave out one")
    if args.share_trunk:
        raise RecipeError(
            "a critic that is a head on the policy's trunk cannot be another model",
            where="share_trunk, value_model",
            fix="leave out one",
        )
    if isinstance(value_model, str):
        value_model, shift = _load_whole_classifier(resolve(value_model))
    elif any(
        value_model is reward for reward in _reward_models(inputs.reward)
    ):  # the critic trains, the reward must not
        value_model = copy.deepcopy(value_model)
    critic = disable_dropout(value_model).to(args.device)
    if getattr(critic.config, "num_labels", 0) != 1:
        raise ModelError("a critic is a sequence classifier with one output", where="value_model", fix="num_labels=1")
    return Critic(critic, "reward_model", shift)


def _reward_models(reward: Any) -> Iterator[Any]:
    """Each reward by itself, those of lists and ensembles too."""
    if isinstance(reward, Ensemble | list | tuple):
        for item in reward.members if isinstance(reward, Ensemble) else reward:
            yield from _reward_models(item)
    else:
        yield reward


def _load_whole_classifier(ref: ModelRef) -> tuple[Any, float]:
    """A reward model or critic in fp32, its adapter merged, and the mean that is subtracted from what it gives."""
    model: Any = load_reward_model(ref, ModelSection(dtype="float32"))
    return merged(model), reward_head(ref.path).mean


def _critic_from_reward(
    inputs: TrainerModels, args: PPOConfig, policy: Any, tokenizer: PreTrainedTokenizerBase
) -> Critic | None:
    """A copy of the reward model where it can be the critic: it reads the policy's tokens and has its architecture."""
    reward, reward_tokenizer = inputs.reward, inputs.reward_tokenizer
    ref = resolve(reward) if isinstance(reward, str) else None
    if ref is not None:
        check_critic_head(reward_head(ref.path), args.value_head_init)
    if ref is not None and reward_tokenizer is None:
        reward_tokenizer = load_tokenizer(ref)
    if reward_tokenizer is not None and reward_tokenizer.get_vocab() != tokenizer.get_vocab():
        return None
    if ref is not None:
        model, mean = _load_whole_classifier(ref)
    elif isinstance(reward, torch.nn.Module):
        model, mean = copy.deepcopy(reward), 0.0
    else:
        return None
    if not same_architecture(model, policy):
        return None
    return Critic(model.to(next(policy.parameters()).device), args.value_head_init, mean)


def new_critic(policy: Any) -> Any:
    """A sequence classifier with one output on a copy of the policy's trunk. Its head is random.

    Raises ModelError where transformers has none for this architecture.
    """
    whole = merged(copy.deepcopy(policy))
    config = copy.deepcopy(whole.config)
    config.num_labels = 1
    classifier: Any = AutoModelForSequenceClassification
    try:
        critic = classifier.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence classifier for {type(whole).__name__}, which the critic would be",
            where="value_model",
            fix="give a value_model, or share_trunk=True",
        ) from error
    critic = disable_dropout(critic.float().to(next(whole.parameters()).device))
    backbone(critic).load_state_dict(backbone(whole).state_dict())
    return critic
