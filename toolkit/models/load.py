"""Policies, references and reward models from their names: loading, and making them trainable."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from toolkit.engine.fast import adapters, speedups
from toolkit.errors import ModelError
from toolkit.models.config import read_config, refuse_quantised, unreadable_model
from toolkit.models.files import ADAPTER_CONFIG, FIX, UNREADABLE, check_weights, model_json
from toolkit.models.inspect import (
    backbone,
    check_finite,
    disable_dropout,
    is_encoder,
    learned_positions,
    torch_dtype,
)
from toolkit.models.merged import merged
from toolkit.models.remote_code import remote_code_allowed
from toolkit.models.resolve import ModelRef, below_adapters, require_policy, resolve, resolve_base
from toolkit.models.reward_head import reward_head
from toolkit.models.sharding import is_sharded
from toolkit.recipe.training import Lora, ModelSection

# The heads of transformers' sequence classifiers: of decoders, and of encoders, some of which pool first.
SCORE_HEAD = "score"
NEW_HEADS = (SCORE_HEAD, "classifier", "pre_classifier", "pooler", "head")


def load_policy(ref: ModelRef, section: ModelSection, *, dtype: torch.dtype | None = None) -> Any:
    """A causal language model, in evaluation mode, without dropout. An adapter stays unmerged on its base, into which
    adapters below it are merged.

    Raises ModelError where it cannot be read, is a reward model, or has weights that are not finite.
    """
    require_policy(ref)
    dtype = dtype or torch_dtype(section.dtype)
    if ref.kind == "adapter":
        model = _with_adapter(merged(load_policy(resolve_base(Path(ref.path)), section, dtype=dtype)), ref)
    else:
        model = _from_pretrained(AutoModelForCausalLM, ref, section, dtype)
    check_finite(model, ref.spec)
    return disable_dropout(model).eval()


def load_reward_model(ref: ModelRef, section: ModelSection, *, dtype: torch.dtype | None = None) -> Any:
    """A sequence classifier, whose outputs :func:`toolkit.models.reward_head.reward_head` makes one score of.

    Raises ModelError where it cannot be read, is no sequence classifier, or has other outputs than its head says.
    """
    if ref.kind == "ensemble":
        raise ModelError(
            f"{ref.spec!r} is an ensemble of reward models, and here one model is needed",
            where=ref.path,
            fix="name one of its members",
        )
    dtype = dtype or torch_dtype(section.dtype)
    if ref.kind == "adapter":
        model = _load_reward_adapter(ref, section, dtype)
    else:
        _check_classifier(ref)
        model = _from_pretrained(AutoModelForSequenceClassification, ref, section, dtype)
    check_finite(model, ref.spec)
    return disable_dropout(model).eval()


def _load_reward_adapter(ref: ModelRef, section: ModelSection, dtype: torch.dtype) -> Any:
    _check_seq_cls(ref)
    n_outputs = reward_head(ref.path).n_outputs
    model = _with_adapter(_with_new_head(resolve_base(Path(ref.path)), section, dtype, n_outputs), ref)
    _restore_head(model, ref)
    return model


def _restore_head(model: Any, ref: ModelRef, adapter: str = "default") -> None:
    """Give the adapter its head as it was saved: peft rounds it to the base's precision."""
    saved = adapter_weights(ref)
    heads = adapters.trained_in_full(model, adapter)
    for name, head in heads.items():
        for part, weight in head.named_parameters():
            key = f"base_model.model.{name}.{part}"
            if key not in saved:
                raise ModelError(f"{ref.spec!r} lacks the head that scores", where=ref.path, fix=FIX)
            weight.data = saved[key].float()


def load_shared_members(
    members: Sequence[ModelRef], section: ModelSection, *, dtype: torch.dtype | None = None
) -> Any | None:
    """Reward models that are adapters on one base as one model: each is an adapter named by its folder.

    None where they are not. The model is in evaluation mode, without dropout.
    """
    if any(member.kind != "adapter" for member in members):
        return None
    bases = [resolve_base(Path(member.path)) for member in members]
    if len({base.fingerprint for base in bases}) > 1:
        return None
    dtype = dtype or torch_dtype(section.dtype)
    model: Any = None
    for member in members:
        _check_seq_cls(member)
        name = Path(member.path).name
        if model is None:
            model = _with_adapter(_with_new_head(bases[0], section, dtype), member, name)
        else:
            _add_adapter(model, member, name)
        _restore_head(model, member, name)
        check_finite(model, member.spec)
    return disable_dropout(speedups.install(model)).eval()


def _check_seq_cls(ref: ModelRef) -> None:
    """Raises ModelError where an adapter is a policy's."""
    if model_json(Path(ref.path) / ADAPTER_CONFIG).get("task_type") != "SEQ_CLS":
        raise ModelError(
            f"{ref.spec!r} is the adapter of a policy, not of a reward model",
            where="reward model",
            fix="name a reward model, such as RUN/reward_model/model",
        )


def reads_pairs(ref: ModelRef) -> bool:
    """Whether a reward model, or a model to start one from, is an encoder, which reads a pair of texts."""
    if ref.kind == "ensemble":
        return all(reads_pairs(resolve(str(Path(ref.path) / name))) for name in reward_head(ref.path).members)
    return is_encoder(read_config(below_adapters(ref)))


def table_of_positions(ref: ModelRef) -> int | None:
    """:func:`toolkit.models.inspect.learned_positions` of a model whose weights are not loaded."""
    whole = below_adapters(ref)
    config = read_config(whole)
    auto: Any = AutoModel
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=remote_code_allowed())
    except UNREADABLE as error:
        raise unreadable_model(whole, error) from error
    return learned_positions(model)


def _check_classifier(ref: ModelRef) -> None:
    """Raises ModelError where a full model is no sequence classifier with the outputs that its head says."""
    config = read_config(ref)
    if not any("SequenceClassification" in name for name in config.architectures or []):
        raise ModelError(
            f"{ref.spec!r} is not a reward model: its architecture is {config.architectures}",
            where="reward model",
            fix="name a folder of a sequence classifier with one output, such as RUN/reward_model/model",
        )
    expected = reward_head(ref.path).n_outputs
    if config.num_labels != expected:
        says = "a reward model has one" if expected == 1 else f"its reward_head.json says {expected}"
        raise ModelError(f"{ref.spec!r} has {config.num_labels} outputs, {says}", where="reward model")


def attention(section: ModelSection) -> str:
    """The attention that a model computes with, where its architecture allows it."""
    return section.attn_implementation or speedups.default_attention()


def _with_new_head(ref: ModelRef, section: ModelSection, dtype: torch.dtype, n_outputs: int = 1) -> Any:
    """A language model with a new head in the place of its unembedding, or an encoder with a new head.

    An adapter is merged into the trunk: transformers would add it as one that training replaces.

    Raises ModelError for the adapter of an encoder.
    """
    if ref.kind == "adapter" and reads_pairs(ref):
        fix = "merge it first: PeftModel's merge_and_unload(), then save_pretrained()"
        raise ModelError(f"{ref.spec!r} is an adapter on an encoder", where=ref.path, fix=fix)
    whole = below_adapters(ref)
    model = _from_pretrained(
        AutoModelForSequenceClassification, whole, section, dtype, new_head=NEW_HEADS, num_labels=n_outputs
    )
    if ref.kind == "adapter":
        backbone(model).load_state_dict(backbone(merged(load_policy(ref, section, dtype=dtype))).state_dict())
    return model


def _from_pretrained(
    auto_class: Any,
    ref: ModelRef,
    section: ModelSection,
    dtype: torch.dtype,
    *,
    new_head: tuple[str, ...] = (),
    **settings: Any,
) -> Any:
    """Load a model. Raises ModelError where its files lack weights, except those of the modules ``new_head``."""
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
        raise unreadable_model(ref, error) from error
    missing = sorted(name for name in report["missing_keys"] if not _is_of(name, new_head))
    if missing:
        raise ModelError(
            f"{len(missing)} weights of {ref.spec!r} are not in its files, {missing[0]} among them",
            where=ref.path,
            fix=FIX,
        )
    return speedups.install(model, replace_attention=replace)


def _is_of(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a weight of this name belongs to one of the modules, at any depth."""
    return any(f".{module}." in f".{name}" for module in modules)


def _with_adapter(base: Any, ref: ModelRef, name: str = "default") -> Any:
    check_weights(Path(ref.path))
    try:
        model = PeftModel.from_pretrained(base, ref.path, adapter_name=name)
    except UNREADABLE as error:
        raise unreadable_model(ref, error) from error
    _check_complete(model, ref, name)
    return speedups.install(model)


def _add_adapter(model: Any, ref: ModelRef, name: str) -> None:
    """Another adapter on the same base."""
    check_weights(Path(ref.path))
    try:
        model.load_adapter(ref.path, adapter_name=name)
    except UNREADABLE as error:
        raise unreadable_model(ref, error) from error
    _check_complete(model, ref, name)


def _check_complete(model: Any, ref: ModelRef, name: str) -> None:
    """Raises ModelError where the files of an adapter lack weights."""
    refuse_incomplete(get_peft_model_state_dict(model, adapter_name=name).keys() - adapter_weights(ref).keys(), ref)


def adapter_weights(ref: ModelRef) -> dict[str, torch.Tensor]:
    """The weights in the files of an adapter, by peft's names. Raises ModelError where they cannot be read."""
    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(ref.path, device="cpu")
    except UNREADABLE as error:
        raise unreadable_model(ref, error) from error
    return weights


def refuse_incomplete(missing: Collection[str], ref: ModelRef) -> None:
    """Raises ModelError where an adapter lacks weights, by these names."""
    if missing:
        what = f"{len(missing)} weights of the adapter {ref.spec!r} are not in its files, {min(missing)} among them"
        raise ModelError(what, where=ref.path, fix=FIX)


def trainable(model: Any, lora: Lora | None, *, task: str, modules_to_save: list[str] | None = None) -> Any:
    """Make a model trainable: with a LoRA adapter on frozen weights, or without ``lora`` all weights, in fp32.

    A model that comes with an adapter goes on training that one. The rest is as :func:`adapted` has it.
    """
    assert not is_sharded(model)  # its optimiser would get other weights than those that it computes with
    if lora is None:
        return model.float().requires_grad_(True)
    if isinstance(model, PeftModel):
        return _go_on(model)
    return speedups.install(adapted(model, lora, task=task, modules_to_save=modules_to_save))


def adapted(model: Any, lora: Lora, *, task: str, modules_to_save: list[str] | None = None) -> PeftModel:
    """A model with a new LoRA adapter on its frozen weights. What trains is in fp32, whatever the model is in.

    ``task`` and ``modules_to_save`` (heads that train in full) are peft's. Raises ModelError where no layer gets an
    adapter.
    """
    try:
        with_adapter = get_peft_model(model, lora_config(lora, task=task, modules_to_save=modules_to_save))
    except (ValueError, re.error) as error:  # layers that the model lacks or peft has no adapter for; no expression
        raise ModelError(
            f"{type(model).__name__} has no layers {lora.target_modules!r} that take an adapter",
            where="model.lora.target_modules",
            fix="all-linear, or linear layers that the policy and the reward model have, such as [q_proj, v_proj]",
        ) from error
    for weight in with_adapter.parameters():
        # peft keeps the adapters in fp32, but not the heads that train in full.
        if weight.requires_grad:
            weight.data = weight.data.float()
    return with_adapter


def _go_on(model: PeftModel) -> Any:
    """Let the training of a loaded adapter go on, and that of the head that was trained with it."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(adapters.is_adapter_weight(name) or ".modules_to_save." in name)
        if weight.requires_grad:
            weight.data = weight.data.float()
    return speedups.install(model)


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


def new_reward_model(ref: ModelRef, section: ModelSection, pad_token_id: int, seed: int, n_outputs: int = 1) -> Any:
    """A reward model to train, from a causal language model or an encoder, with a new head of ``n_outputs``. An adapter
    is merged into its weights. Raises ModelError for a quantised model.

    A linear head has weights of std 1/sqrt(d+1), d being the hidden size (Huang et al. 2024, arXiv 2403.17031, detail
    11; Stiennon et al. 2020). A head of several layers, as encoders have it, starts as transformers starts it.
    """
    refuse_quantised(ref, "reward_model.base")
    dtype = torch_dtype(section.dtype) if section.lora is not None else torch.float32
    torch.manual_seed(seed)  # for heads that are not linear
    model = _with_new_head(ref, section, dtype, n_outputs)
    model.config.pad_token_id = pad_token_id
    head = dict(model.named_children()).get(SCORE_HEAD)
    if isinstance(head, torch.nn.Linear):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.weight.shape[1] + 1))
    return disable_dropout(model)


def head_modules(model: Any) -> list[str]:
    """The modules of a sequence classifier that are new and train in full: its head, with the pooling before it."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if list(module.parameters())}
    return [name for name in NEW_HEADS if name in names]
