"""Policies, references, reward models and critics: checking, loading, saving. Finding them: ``locating.py``."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from toolkit import adapters, norms
from toolkit.attention import GROUPED, takes_grouped
from toolkit.errors import ModelError
from toolkit.locating import REWARD_HEAD_FILE, TRAINING_RECORD_FILE, ModelRef, resolve_base
from toolkit.recipe import Lora, ModelSection
from toolkit.store import read_json, write_json

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Tokens that model families reserve and that text never holds, in the order we would use them as padding.
PAD_CANDIDATES = (
    "<|endoftext|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<unk>",
)


def convert_gguf(file: Path, target: Path) -> None:
    """Write a GGUF file's weights as a plain bf16 model folder, whole or not at all.

    transformers dequantises the file, but the result refuses ``save_pretrained``; so the model is built
    again from its configuration without the quantisation and takes the state dict.
    """
    name = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    plain.save_pretrained(partial)
    tokenizer = AutoTokenizer.from_pretrained(**name)
    _separate_pad(tokenizer)
    tokenizer.save_pretrained(partial)
    if not target.exists():
        os.rename(partial, target)
    shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------- tokenizers


def load_tokenizer(ref: ModelRef, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, with a padding token that is not the end of text where one exists.

    Raises ModelError where it cannot be read.
    """
    path = ref.path
    if ref.kind == "adapter" and not (Path(path) / "tokenizer_config.json").is_file():
        return load_tokenizer(resolve_base(Path(path)), chat_template)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=ref.revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {ref.spec!r} cannot be read: {_first_line(error)}", where=path) from error
    _separate_pad(tokenizer)
    if chat_template:
        template = Path(chat_template)
        if not template.is_file():
            raise ModelError("there is no such chat template", where=chat_template, fix="correct model.chat_template")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _separate_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Sequence-classification heads pool the last token that is not padding, so padding must not be the EOS."""
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    known = tokenizer.get_vocab()
    for token in PAD_CANDIDATES:
        if token in known and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return
    # Our own code never infers padding from ids, so the EOS will do where there is nothing else.
    tokenizer.pad_token = tokenizer.eos_token


def require_chat_template(tokenizer: PreTrainedTokenizerBase, spec: str) -> None:
    """Raises ModelError when conversations meet a tokenizer that has no template for them."""
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the data holds conversations, and the tokenizer of {spec!r} has no chat template",
            where="model.name",
            fix="set model.chat_template to a Jinja file, or data.conversational=false to train on plain transcripts "
            "(duel rewards, duel score: --plain)",
        )


def response_end(tokenizer: PreTrainedTokenizerBase, conversational: bool) -> int:
    """The id that ends a response: what the chat template puts behind an assistant turn, else the EOS.

    Raises ModelError where there is neither.
    """
    if conversational:
        marker = "duel-response-text"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(marker)[2]
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer names no end of text, and a response needs one",
            where=str(tokenizer.name_or_path),
            fix="set eos_token in tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the tokenizer's, the chat template's and the generation configuration's."""
    ids = set()
    if tokenizer.chat_template is not None:
        ids.add(response_end(tokenizer, True))
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    configured = model.generation_config.eos_token_id
    ids.update(int(i) for i in (configured if isinstance(configured, list) else [configured]) if i is not None)
    if not ids:
        raise ModelError(
            "neither the tokenizer nor the generation configuration names an end of text", where="eos_token_id"
        )
    return sorted(ids)


def check_vocabulary(rows: int, tokenizer: PreTrainedTokenizerBase, spec: str) -> None:
    """Raises ModelError when the tokenizer can produce ids that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {spec!r} has ids up to {highest}, the model has {rows} embeddings",
            where="model.name",
            fix="use the tokenizer that the model was trained with, or resize the embeddings first",
        )


# ---------------------------------------------------------------- loading


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
        head = model.get_base_model().score.modules_to_save["default"]
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
    return ModelError(f"{ref.spec!r} cannot be loaded: {_first_line(error)}", where=ref.path, fix=fix)


def attention(section: ModelSection) -> str:
    """The attention to load with: by default our own on a CPU, where a tree's mask is dense and rows are short."""
    return section.attn_implementation or ("sdpa" if torch.cuda.is_available() else GROUPED)


def _from_pretrained(
    cls: Any, ref: ModelRef, section: ModelSection, dtype: torch.dtype, *, may_miss: str = "", **more: Any
) -> PreTrainedModel:
    """Load, and refuse weights that are not all there (``may_miss``: but for a new head of this name)."""
    by_default = section.attn_implementation is None and attention(section) == GROUPED
    # Eager until the model is known to be one that can have another.
    chosen = "eager" if by_default else attention(section)
    settings = {"revision": ref.revision, "dtype": dtype, "attn_implementation": chosen, **more}
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
    if by_default:
        norms.lean(model)
        if takes_grouped(model):
            model.set_attn_implementation(GROUPED)
    return model


def _with_adapter(base: PreTrainedModel, ref: ModelRef) -> PeftModel:
    try:
        return adapters.lean(PeftModel.from_pretrained(base, ref.path))
    except UNREADABLE as error:
        raise _unreadable(ref, error) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def check_finite(model: nn.Module, spec: str) -> None:
    """Raises ModelError naming the first weight that is NaN or infinite."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(
                "this model has weights that are not finite", where=f"{spec}: {name}", fix="use an earlier checkpoint"
            )


def disable_dropout(model: Any) -> Any:
    """Dropout off for good: PPO's ratio must be 1 before the first update.

    Rates stand in dropout modules, in attributes of others that copied them out of the configuration (OPT), and in the
    configuration itself, which attention reads; those of layers that are left out whole are among them.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _no_dropout_rates(module)
    for config in (model.config, model.config.get_text_config()):
        _no_dropout_rates(config)
    return model


def _no_dropout_rates(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)


@contextmanager
def precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """The autocast under which training, old log-probabilities, reference and evaluation all run."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


# ---------------------------------------------------------------- training


def trainable(model: PreTrainedModel, lora: Lora | None, *, task: str, modules_to_save: list[str] | None = None) -> Any:
    """Make a model trainable: a LoRA adapter on frozen weights, or all weights in fp32."""
    if lora is None:
        return model.float().requires_grad_(True)
    adapted = get_peft_model(model, lora_config(lora, task=task, modules_to_save=modules_to_save))
    for weight in adapted.parameters():
        # peft keeps the adapters in fp32, but not the heads that train in full.
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapters.lean(adapted)


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


def reward_mean(folder: str | Path) -> float:
    """What the reward model's raw score is shifted by, as its training stage measured it; 0 for any other model."""
    path = Path(folder) / REWARD_HEAD_FILE
    return float(read_json(path)["mean"]) if path.is_file() else 0.0


def write_reward_mean(folder: Path, mean: float) -> None:
    write_json(folder / REWARD_HEAD_FILE, {"mean": mean})


def merge_and_save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Write a plain model: an adapter is merged in fp32 first, so that rounding happens once."""
    if isinstance(model, PeftModel):
        model = model.float().merge_and_unload()
    # A reward model on these weights finds the end of a row by it, wherever it is loaded.
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_policy(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype, base: Path
) -> None:
    """Write an adapter that names its base, or a plain model that stands alone; with the tokenizer."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        path = folder / "adapter_config.json"
        # peft would name the folder that the base was loaded from, which a stage may have resolved through a link.
        write_json(path, read_json(path) | {"base_model_name_or_path": str(base.resolve())})
    else:
        model.save_pretrained(
            folder, state_dict={name: weight.to(dtype) for name, weight in model.state_dict().items()}
        )
    tokenizer.save_pretrained(folder)


def write_training_record(folder: Path, **facts: object) -> None:
    """What a policy was trained with (arm, beta, reference fingerprint), beside its weights."""
    write_json(folder / TRAINING_RECORD_FILE, facts)


def parameter_count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def best_device() -> torch.device:
    """This process's accelerator where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def inner(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper; its adapters stay in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: Any) -> nn.Module:
    """The model without its head."""
    whole = inner(model)
    return getattr(whole, whole.base_model_prefix)


def attention_window(model: Any) -> int | None:
    """How many tokens, itself included, a token attends to where a layer has a window; None where no layer has one."""
    config = inner(model).config.get_text_config()
    if all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ["unknown"]):
        return None
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    local = "local" in (getattr(config, "attention_layers", None) or ())  # GPT-Neo
    found = (sliding, getattr(config, "attention_chunk_size", None), config.window_size if local else None)
    return min(filter(None, found), default=None)


def learned_positions(model: Any) -> int | None:
    """How many tokens a model with a table of positions can read; None where positions are computed."""
    whole = inner(model)
    limit = getattr(whole.config.get_text_config(), "max_position_embeddings", None)
    words = whole.get_input_embeddings()
    for module in whole.modules() if limit else ():
        # Some tables have two rows more: for an offset (OPT), or for the padding before the first (RoBERTa).
        if isinstance(module, nn.Embedding) and module is not words and 0 <= module.num_embeddings - limit <= 2:
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(min(limit, module.num_embeddings - before))
    return None
