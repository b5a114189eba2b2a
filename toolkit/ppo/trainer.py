"""``PPOTrainer``: PPO from models and data sets, used as any TRL trainer is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase, TrainerCallback

from toolkit.engine.engine import Engine
from toolkit.engine.fast import adapters, speedups
from toolkit.errors import DataError, ModelError, RecipeError
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.inspect import DTYPES, backbone, disable_dropout, inner
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.save import reward_mean
from toolkit.models.tokenizer import check_vocabulary, eos_ids, load_tokenizer
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.loop import PPOLoop
from toolkit.ppo.models import POLICY, Actors, SeparateModels, SharedBase, is_on, new_critic
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.rewards import Ensemble, Sampled, Source, reads_the_same, sources
from toolkit.recipe.schema import ModelSection
from toolkit.training.trainer import seed_everything

# Ways to start an adapter that take from the base what they put into it.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")


class PPOTrainer(PPOLoop):
    """PPO of a causal language model.

    ``model``: a model, or its name or folder. With ``peft_config`` (LoRA) it trains an adapter on frozen weights, which
    are then the reference; policy, critic and a reward model that is an adapter on the same weights share them. A
    ``PeftModel`` goes on training its adapter, against a frozen copy of it. Otherwise all weights train, in fp32.

    ``reward``: a sequence classifier with one output (or its name or folder), a :class:`toolkit.ppo.Ensemble`, a
    function ``f(prompts, completions, completion_ids, **columns)`` as TRL takes it (sync or async; a number, None, or a
    list of (token position, value) steps for each completion), or a list of these, weighted by ``reward_weights``.
    ``reward_processing_classes``: tokenizers of loaded reward models that have another one than the policy.

    ``train_dataset``, ``eval_dataset``: rows with a ``prompt``, text or messages; their other columns go to reward
    functions. ``ptx_dataset``: rows with ``prompt`` and ``completion`` for ``ptx_coef``.

    ``value_model``: a sequence classifier (or its name or folder) to start the critic from; None takes the reward model
    where it can be the policy's critic (an adapter on the same weights, or a classifier of the same architecture and
    tokenizer), else the policy's trunk. ``reference``: a model, its name or folder; None is the policy as it is now.

    Raises RecipeError, ModelError or DataError for what cannot be trained; the message says why.
    """

    def __init__(
        self,
        model: Any,
        args: PPOConfig,
        reward: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        value_model: Any = None,
        reference: Any = None,
        peft_config: LoraConfig | None = None,
        ptx_dataset: Any = None,
        reward_processing_classes: Sequence[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        seed_everything(args.seed)
        dtype = "bfloat16" if args.bf16 else "float32"
        ref = resolve(model) if isinstance(model, str) else None
        if ref is not None:
            adapted = peft_config is not None or ref.kind == "adapter"
            # Weights that train stay in fp32; autocast lowers the products alone.
            section = ModelSection(name=ref.spec, dtype=dtype if adapted else "float32")
            policy: Any = load_policy(ref, section)
        else:
            section, policy = ModelSection(dtype=dtype), disable_dropout(model)
        tokenizer = processing_class or _tokenizer(ref, policy)
        policy = policy.to(args.device)
        _check_whole(policy, peft_config)
        check_vocabulary(policy.get_input_embeddings().weight.shape[0], tokenizer, str(tokenizer.name_or_path))

        reads = (reward_processing_classes or [None])[0]
        shared_reward = _adapter_on(ref, reward, peft_config, value_model, reference, tokenizer, reads)
        section = ModelSection(name=section.name, dtype=dtype)
        loaded = (
            []
            if shared_reward
            else sources(reward, tokenizer, section, args.device, tokenizers=reward_processing_classes)
        )
        actors = _actors(
            policy, args, tokenizer, dtype, peft_config, value_model, reference, shared_reward, reward, reads
        )
        if shared_reward is not None:
            assert isinstance(actors, SharedBase)
            loaded = [adapter_source(actors)]

        super().__init__(
            actors,
            args,
            prompts_of(train_dataset, tokenizer, args, "train_dataset"),
            loaded,
            tokenizer,
            eval_prompts=prompts_of(eval_dataset, tokenizer, args, "eval_dataset") if eval_dataset is not None else (),
            ptx=ptx_trees(ptx_dataset, tokenizer, args) if ptx_dataset is not None else (),
            eos_ids=args.stop_token_ids or eos_ids(inner(policy), tokenizer),
            dtype=DTYPES[dtype],
            keep=self._keep_milestone,
            callbacks=callbacks,
        )

    def _keep_milestone(self, step: int) -> None:
        """``milestones/step-N`` in the output folder: the policy whose rollout passed a KL milestone, or its average
        where one is kept."""
        self.export(Path(str(self.args.output_dir)) / "milestones" / f"step-{step}")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample each prompt of ``eval_dataset`` (or of the trainer's) once: score, KL, length, end-of-text rate."""
        prompts = eval_dataset
        if eval_dataset is not None and not all(isinstance(row, PromptIds) for row in eval_dataset):
            prompts = prompts_of(eval_dataset, self.how.tokenizer, self.args, "eval_dataset")
        return super().evaluate(prompts, ignore_keys, metric_key_prefix)


def adapter_source(actors: SharedBase) -> Source:
    """The reward adapter on the policy's own base."""

    def score(sampled: Sampled) -> list[float]:
        return actors.reward_scores(sampled.trees)

    return score


def prompts_of(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: PPOConfig, where: str) -> list[PromptIds]:
    """The prompts of a data set as token ids; those over ``max_prompt_length`` are left out with a warning.

    Raises DataError for a missing column, an empty data set, or messages that the tokenizer has no template for.
    """
    rows = list(dataset)
    if rows and "prompt" not in rows[0]:
        raise DataError(
            "there is no column prompt", where=f"{where}, with the columns {sorted(rows[0])}", fix="rename one of them"
        )
    out, long = [], 0
    names = dict.fromkeys(name for row in rows for name in row)
    for index, row in enumerate(rows):
        prompt = row["prompt"]
        ids = text_encoder(tokenizer, prompt).prompt(prompt)
        if not ids:
            raise DataError("a prompt is empty", where=f"{where}, row {index}", fix="leave the row out")
        if args.max_prompt_length is not None and len(ids) > args.max_prompt_length:
            long += 1
            continue
        columns = {name: row.get(name) for name in names if name != "prompt"}
        out.append(PromptIds(str(row.get("prompt_id", index)), ids, prompt, columns))
    if not out:
        raise DataError(
            "no prompt is left" if rows else "there is no prompt", where=where, fix="raise max_prompt_length"
        )
    if long:
        warnings.warn(
            f"{where}: {long} of {len(rows)} prompts have more than {args.max_prompt_length} tokens", stacklevel=3
        )
    return out


def ptx_trees(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> list[Tree]:
    """Prompts with their one completion, cut at ``response_length``."""
    out = []
    for row in dataset:
        if "prompt" not in row or "completion" not in row:
            raise DataError("a row needs prompt and completion", where="ptx_dataset", fix=f"it has {sorted(row)}")
        completion = row["completion"]
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        encoded = text_encoder(tokenizer, row["prompt"]).encode(row["prompt"], [text], args.response_length)
        out.append(encoded.tree)
    return out


def _tokenizer(ref: ModelRef | None, policy: Any) -> PreTrainedTokenizerBase:
    if ref is None:
        ref = resolve(str(inner(policy).config.name_or_path))
    return load_tokenizer(ref)


def _check_whole(policy: Any, peft_config: LoraConfig | None) -> None:
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
            fix=f"load it under peft's own name, {POLICY}",
        )
    for config in [peft_config, *(policy.peft_config.values() if isinstance(policy, PeftModel) else ())]:
        if getattr(config, "bias", "none") != "none":
            raise RecipeError("biases would be shared by policy and reference", where="peft_config", fix='bias="none"')
        for name in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, name, None):
                raise RecipeError(
                    "PPO trains the low-rank weights of an adapter alone",
                    where=f"peft_config.{name}",
                    fix="leave it out",
                )
        start = getattr(config, "init_lora_weights", True)
        if peft_config is not None and str(start).startswith(CHANGE_THE_BASE):
            raise RecipeError(
                f"{start} changes the weights below the adapter, which is then no adapter on the model that you named",
                where="peft_config.init_lora_weights",
                fix="True, or gaussian",
            )
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        raise RecipeError(f"{type(peft_config).__name__} is not supported", where="peft_config", fix="LoraConfig")


def _adapter_on(
    ref: ModelRef | None,
    reward: Any,
    peft_config: LoraConfig | None,
    value_model: Any,
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase | None,
) -> ModelRef | None:
    """The reward model's folder where it is an adapter on the very weights of the policy, which can then be shared,
    and reads the tokens that the policy writes."""
    if ref is None or peft_config is None or not isinstance(reward, str) or value_model is not None:
        return None
    reward_ref = resolve(reward)
    if reference is not None or not is_on(ref, reward_ref):
        return None
    same = reads_the_same(reward_tokenizer or load_tokenizer(reward_ref), tokenizer)
    return reward_ref if same and LoraConfig.from_pretrained(reward_ref.path).bias == "none" else None


def _actors(
    policy: Any,
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    peft_config: LoraConfig | None,
    value_model: Any,
    reference: Any,
    shared_reward: ModelRef | None,
    reward: Any,
    reward_tokenizer: PreTrainedTokenizerBase | None,
) -> Actors:
    pad_id, device = int(tokenizer.pad_token_id), args.device
    if args.share_trunk and value_model is not None:
        raise RecipeError(
            "a critic on the policy's own trunk is no other model",
            where="share_trunk, value_model",
            fix="leave out one",
        )
    if value_model is not None and any(value_model is item for item in _each(reward)):  # one trains, the other must not
        value_model = copy.deepcopy(value_model)
    shift = 0.0
    if isinstance(value_model, str):
        value_model, shift = _whole_classifier(resolve(value_model))
    critic = disable_dropout(value_model).to(device) if value_model is not None else None
    if critic is not None and getattr(critic.config, "num_labels", 0) != 1:
        raise ModelError("a critic is a sequence classifier with one output", where="value_model", fix="num_labels=1")
    if peft_config is not None:
        config = copy.deepcopy(peft_config)
        config.lora_dropout, config.task_type = 0.0, "CAUSAL_LM"
        policy = get_peft_model(policy, config)
    if isinstance(policy, PeftModel):
        speedups.install(policy)
        for name, weight in policy.named_parameters():
            weight.requires_grad_(adapters.is_adapter_weight(name))
            if weight.requires_grad:
                weight.data = weight.data.float()
        if critic is None and reference is None:
            return SharedBase(
                policy,
                engine=Engine(policy, pad_id, dtype=DTYPES[dtype]),
                reward=shared_reward,
                value_head_init=args.value_head_init,
                mean=reward_mean(shared_reward.path) if shared_reward else 0.0,
                share_trunk=args.share_trunk,
            )
    else:
        policy = policy.float().requires_grad_(True)
    # A reference in the policy's own precision, so that the KL between two equal models is 0.
    if isinstance(reference, str):
        own = next(backbone(policy).parameters()).dtype
        reference = load_policy(resolve(reference), ModelSection(name=reference), dtype=own)
    frozen = reference if reference is not None else copy.deepcopy(policy)
    frozen = disable_dropout(frozen).eval().to(device)
    value_head_init = args.value_head_init
    if args.share_trunk:
        critic = None
    elif critic is None:
        taken = _reward_as_critic(reward, policy, tokenizer, reward_tokenizer)
        critic, shift = taken if taken is not None else (new_critic(copy.deepcopy(policy)), 0.0)
        value_head_init = args.value_head_init if taken is not None else "zero"
    else:
        value_head_init = "reward_model"  # the user's critic keeps its own head
    return SeparateModels(
        policy,
        frozen,
        critic,
        pad_id=pad_id,
        dtype=DTYPES[dtype],
        value_head_init=value_head_init,
        value_shift=shift,
    )


def _each(reward: Any) -> Iterator[Any]:
    if isinstance(reward, Ensemble | list | tuple):
        for item in reward.members if isinstance(reward, Ensemble) else reward:
            yield from _each(item)
    else:
        yield reward


def _whole_classifier(ref: ModelRef) -> tuple[Any, float]:
    """A reward model or critic in fp32, its adapter merged, and the mean that is subtracted from what it gives."""
    loaded = load_reward_model(ref, ModelSection(name=ref.spec, dtype="float32"))
    return (loaded.merge_and_unload() if isinstance(loaded, PeftModel) else loaded), reward_mean(ref.path)


def _reward_as_critic(
    reward: Any, policy: Any, tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Any, float] | None:
    """A copy of the reward model and its mean, where it can be the critic: same tokens, one model."""
    ref = resolve(reward) if isinstance(reward, str) else None
    if ref is not None and reward_tokenizer is None:
        reward_tokenizer = load_tokenizer(ref)
    if reward_tokenizer is not None and reward_tokenizer.get_vocab() != tokenizer.get_vocab():
        return None
    if ref is not None:
        model, mean = _whole_classifier(ref)
    elif isinstance(reward, torch.nn.Module):
        model, mean = copy.deepcopy(reward), 0.0
    else:
        return None
    same = inner(model).config.model_type == inner(policy).config.model_type
    linear = isinstance(dict(model.named_children()).get("score"), torch.nn.Linear)
    return (model.to(next(policy.parameters()).device), mean) if same and linear else None
