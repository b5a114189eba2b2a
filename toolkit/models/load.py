"""Policies, references and reward models from their names: loading, and making them trainable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from toolkit.engine.fast import adapters, speedups
from toolkit.errors import ModelError, first_line
from toolkit.files import read_json
from toolkit.models.inspect import DTYPES, check_finite, disable_dropout
from toolkit.models.resolve import ModelRef, resolve_base
from toolkit.recipe.schema import Lora, ModelSection


def load_policy(
    ref: ModelRef, section: ModelSection, *, dtype: torch.dtype | None = None
) -> PreTrainedModel | PeftModel:
    """A causal language model, in evaluation mode, without dropout. An adapter stays unmerged on its base.

    Raises ModelError where it cannot be read, or where its weights are not finite.
    """
    dtype = dtype or DTYPES[section.dtype]
    if ref.kind == "adapter":
        base = load_policy(resolve_base(Path(ref.path)), section, dtype=dtype)
        model: Any = _with_adapter(base, ref)
    else:
        model = _from_pretrained(AutoModelForCausalLM, ref, section, dtype)
    check_finite(model, ref.spec)
    return disable_dropout(model).eval()


def load_reward_model(
    ref: ModelRef, section: ModelSection, *, dtype: torch.dtype | None = None
) -> PreTrainedModel | PeftModel:
    """A sequence classifier with one output. Its centring is read with :func:`reward_mean`.

    Raises ModelError where the head has more than one output, or there is none.
    """
    dtype = dtype or DTYPES[section.dtype]
    if ref.kind == "adapter":
        if read_json(Path(ref.path) / "adapter_config.json").get("task_type") != "SEQ_CLS":
            raise ModelError(
                f"{ref.spec!r} is the adapter of a policy, not of a reward model",
                where="reward model",
                fix="name a reward model, such as RUN/reward_model/model",
            )
        below = resolve_base(Path(ref.path))
        base = _from_pretrained(
            AutoModelForSequenceClassification, below, section, dtype, may_miss="score", num_labels=1
        )
        model: Any = _with_adapter(base, ref)
        # peft rounds the head to the base's precision, and scores must be those of the model that was trained.
        saved = load_file(Path(ref.path) / "adapter_model.safetensors")
        head = adapters.trained_copy(model.get_base_model().score)
        head.weight.data = next(weight for name, weight in saved.items() if "score" in name).float()
    else:
        try:
            config = AutoConfig.from_pretrained(ref.path, revision=ref.revision)
        except UNREADABLE as error:
            raise _unreadable(ref, error) from error
        if not any("SequenceClassification" in name for name in config.architectures or []):
            raise ModelError(
                f"{ref.spec!r} is no reward model: its architecture is {config.architectures}",
                where="reward model",
                fix="name a folder of a sequence classifier with one output, such as RUN/reward_model/model",
            )
        if config.num_labels != 1:
            raise ModelError(
                f"{ref.spec!r} has {config.num_labels} outputs, a reward model has one", where="reward model"
            )
        model = _from_pretrained(AutoModelForSequenceClassification, ref, section, dtype)
    check_finite(model, ref.spec)
    return disable_dropout(model).eval()


# What reading a damaged, foreign or half-downloaded model raises, by library.
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError, SafetensorError)


def _unreadable(ref: ModelRef, error: Exception) -> ModelError:
    fix = "check that the folder is complete and belongs to this kind of model"
    return ModelError(f"{ref.spec!r} cannot be loaded: {first_line(error)}", where=ref.path, fix=fix)


def attention(section: ModelSection) -> str:
    """The attention that a model computes with, where its architecture allows it."""
    return section.attn_implementation or speedups.default_attention()


def _from_pretrained(
    cls: Any, ref: ModelRef, section: ModelSection, dtype: torch.dtype, *, may_miss: str = "", **more: Any
) -> PreTrainedModel:
    """Load, and refuse weights that are not all there (``may_miss``: but for a new head of this name)."""
    replace = section.attn_implementation is None and not torch.cuda.is_available()
    # Eager until the model is known to be one that can have another.
    loaded_with = "eager" if replace else attention(section)
    settings = {"revision": ref.revision, "dtype": dtype, "attn_implementation": loaded_with, **more}
    try:
        model, report = cls.from_pretrained(ref.path, output_loading_info=True, **settings)
    except UNREADABLE as error:
        raise _unreadable(ref, error) from error
    missing = sorted(name for name in report["missing_keys"] if not may_miss or not name.startswith(may_miss))
    if missing:
        raise ModelError(
            f"{len(missing)} weights of {ref.spec!r} are not in its files, {missing[0]} among them",
            where=ref.path,
            fix="use a complete copy of the model",
        )
    return speedups.install(model, replace_attention=replace)  # type: ignore[no-any-return]


def _with_adapter(base: PreTrainedModel, ref: ModelRef) -> PeftModel:
    try:
        return speedups.install(PeftModel.from_pretrained(base, ref.path))  # type: ignore[no-any-return]
    except UNREADABLE as error:
        raise _unreadable(ref, error) from error


def trainable(model: PreTrainedModel, lora: Lora | None, *, task: str, modules_to_save: list[str] | None = None) -> Any:
    """Make a model trainable: a LoRA adapter on frozen weights, or all weights in fp32."""
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


def new_reward_model(ref: ModelRef, section: ModelSection, pad_token_id: int, seed: int) -> PreTrainedModel:
    """A reward model from a causal language model: a scalar head of std 1/sqrt(d+1) replaces the unembedding.

    Source: Huang et al. 2024 (arXiv 2403.17031), detail 11; Stiennon et al. 2020.
    """
    dtype = DTYPES[section.dtype] if section.lora is not None else torch.float32
    model = _from_pretrained(AutoModelForSequenceClassification, ref, section, dtype, may_miss="score", num_labels=1)
    model.config.pad_token_id = pad_token_id
    generator = torch.Generator().manual_seed(seed)
    head = model.score.weight
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=generator) / math.sqrt(head.shape[1] + 1))
    return disable_dropout(model)
