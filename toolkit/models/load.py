"""Policies, references and reward models from their names: loading, and making them trainable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from toolkit.engine.fast import adapters, speedups
from toolkit.errors import ModelError
from toolkit.models.files import ADAPTER_CONFIG, FIX, UNREADABLE, check_weights, model_json
from toolkit.models.inspect import DTYPES, check_finite, disable_dropout
from toolkit.models.remote_code import remote_code_allowed, unreadable
from toolkit.models.resolve import ModelRef, require_policy, resolve_base
from toolkit.recipe.schema import Lora, ModelSection

# The head of transformers' sequence classifiers.
SCORE_HEAD = "score"


def load_policy(ref: ModelRef, section: ModelSection, *, dtype: torch.dtype | None = None) -> Any:
    """A causal language model, in evaluation mode, without dropout. An adapter stays unmerged on its base.

    Raises ModelError where it cannot be read, is a reward model, or has weights that are not finite.
    """
    require_policy(ref)
    dtype = dtype or DTYPES[section.dtype]
    if ref.kind == "adapter":
        model = _with_adapter(load_policy(resolve_base(Path(ref.path)), section, dtype=dtype), ref)
    else:
        model = _from_pretrained(AutoModelForCausalLM, ref, section, dtype)
    check_finite(model, ref.spec)
    return disable_dropout(model).eval()


def load_reward_model(ref: ModelRef, section: ModelSection, *, dtype: torch.dtype | None = None) -> Any:
    """A sequence classifier with one output; :func:`toolkit.models.save.reward_mean` reads its centring.

    Raises ModelError where it cannot be read, is no sequence classifier, or has more than one output.
    """
    dtype = dtype or DTYPES[section.dtype]
    if ref.kind == "adapter":
        model = _load_reward_adapter(ref, section, dtype)
    else:
        _check_classifier(ref)
        model = _from_pretrained(AutoModelForSequenceClassification, ref, section, dtype)
    check_finite(model, ref.spec)
    return disable_dropout(model).eval()


def _load_reward_adapter(ref: ModelRef, section: ModelSection, dtype: torch.dtype) -> Any:
    if model_json(Path(ref.path) / ADAPTER_CONFIG).get("task_type") != "SEQ_CLS":
        raise ModelError(
            f"{ref.spec!r} is the adapter of a policy, not of a reward model",
            where="reward model",
            fix="name a reward model, such as RUN/reward_model/model",
        )
    model = _with_adapter(_with_new_head(resolve_base(Path(ref.path)), section, dtype), ref)
    # peft rounds the head to the base's precision, and scores must be those of the model that was trained.
    saved = load_file(Path(ref.path) / "adapter_model.safetensors")
    head: Any = adapters.trained_copy(model.get_base_model().score)
    scores = [weight for name, weight in saved.items() if SCORE_HEAD in name]
    if not scores:
        raise ModelError(f"{ref.spec!r} lacks the head that scores", where=ref.path, fix=FIX)
    head.weight.data = scores[0].float()
    return model


def read_config(ref: ModelRef) -> Any:
    """The configuration of a full model. Raises ModelError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(ref.path, revision=ref.revision, trust_remote_code=remote_code_allowed())
    except UNREADABLE as error:
        raise _unreadable(ref, error) from error


def _check_classifier(ref: ModelRef) -> None:
    """Raises ModelError where a full model is not a sequence classifier with one output."""
    config = read_config(ref)
    if not any("SequenceClassification" in name for name in config.architectures or []):
        raise ModelError(
            f"{ref.spec!r} is not a reward model: its architecture is {config.architectures}",
            where="reward model",
            fix="name a folder of a sequence classifier with one output, such as RUN/reward_model/model",
        )
    if config.num_labels != 1:
        raise ModelError(f"{ref.spec!r} has {config.num_labels} outputs, a reward model has one", where="reward model")


def _unreadable(ref: ModelRef, error: Exception) -> ModelError:
    fix = "check that the folder is complete and belongs to this kind of model"
    return unreadable(f"{ref.spec!r} cannot be loaded", ref.spec, ref.path, error, fix)


def attention(section: ModelSection) -> str:
    """The attention that a model computes with, where its architecture allows it."""
    return section.attn_implementation or speedups.default_attention()


def _with_new_head(ref: ModelRef, section: ModelSection, dtype: torch.dtype) -> Any:
    """A causal language model with a new scalar head in the place of its unembedding."""
    return _from_pretrained(AutoModelForSequenceClassification, ref, section, dtype, new_head=SCORE_HEAD, num_labels=1)


def _from_pretrained(
    auto_class: Any, ref: ModelRef, section: ModelSection, dtype: torch.dtype, *, new_head: str = "", **settings: Any
) -> Any:
    """Load a model. Raises ModelError where its files lack weights, except those of a head named ``new_head``."""
    if ref.kind == "folder":
        check_weights(Path(ref.path))
    replace = section.attn_implementation is None and not torch.cuda.is_available()
    # With eager attention until the model is known to support our own.
    loaded_with = "eager" if replace else attention(section)
    settings |= {"revision": ref.revision, "dtype": dtype, "attn_implementation": loaded_with}
    settings["trust_remote_code"] = remote_code_allowed()
    try:
        model, report = auto_class.from_pretrained(ref.path, output_loading_info=True, **settings)
    except UNREADABLE as error:
        raise _unreadable(ref, error) from error
    missing = sorted(name for name in report["missing_keys"] if not new_head or not name.startswith(new_head))
    if missing:
        raise ModelError(
            f"{len(missing)} weights of {ref.spec!r} are not in its files, {missing[0]} among them",
            where=ref.path,
            fix=FIX,
        )
    return speedups.install(model, replace_attention=replace)


def _with_adapter(base: Any, ref: ModelRef) -> Any:
    check_weights(Path(ref.path))
    try:
        model = PeftModel.from_pretrained(base, ref.path)
        saved = load_peft_weights(ref.path, device="cpu").keys()
    except UNREADABLE as error:
        raise _unreadable(ref, error) from error
    missing = sorted(get_peft_model_state_dict(model).keys() - saved)
    if missing:
        what = f"{len(missing)} weights of the adapter {ref.spec!r} are not in its files, {missing[0]} among them"
        raise ModelError(what, where=ref.path, fix=FIX)
    return speedups.install(model)


def trainable(model: Any, lora: Lora | None, *, task: str, modules_to_save: list[str] | None = None) -> Any:
    """Make a model trainable: with a LoRA adapter on frozen weights, or without ``lora`` all weights, in fp32.

    ``task`` and ``modules_to_save`` (heads that train in full) are peft's.
    """
    if lora is None:
        return model.float().requires_grad_(True)
    adapted = get_peft_model(model, lora_config(lora, task=task, modules_to_save=modules_to_save))
    for weight in adapted.parameters():
        # peft keeps the adapters in fp32, but not the heads that train in full.
        if weight.requires_grad:
            weight.data = weight.data.float()
    return speedups.install(adapted)


def lora_config(lora: Lora, *, task: str, modules_to_save: list[str] | None = None) -> LoraConfig:
    """peft's configuration of an adapter."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        task_type=task,
        modules_to_save=modules_to_save,
    )


def new_reward_model(ref: ModelRef, section: ModelSection, pad_token_id: int, seed: int) -> Any:
    """A reward model to train, from a causal language model: a scalar head of std 1/sqrt(d+1), d being the hidden
    size, replaces the unembedding.

    Source: Huang et al. 2024 (arXiv 2403.17031), detail 11; Stiennon et al. 2020.
    """
    dtype = DTYPES[section.dtype] if section.lora is not None else torch.float32
    model = _with_new_head(ref, section, dtype)
    model.config.pad_token_id = pad_token_id
    generator = torch.Generator().manual_seed(seed)
    head = model.score.weight
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=generator) / math.sqrt(head.shape[1] + 1))
    return disable_dropout(model)
