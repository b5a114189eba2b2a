"""Writing policies and reward models, with a record of their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from toolkit.engine.fast.rounding import stochastically_rounded
from toolkit.files import read_json, write_json
from toolkit.models.files import ADAPTER_CONFIG, BASE_RECORD_FILE
from toolkit.models.merged import merged
from toolkit.models.resolve import TRAINING_RECORD_FILE, ModelRef
from toolkit.models.sharding import full_state, is_sharded, written_elsewhere


def merge_and_save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Write a model's full weights. An adapter is merged in fp32 first, so that rounding happens once: as in sampling,
    it keeps what the adapter adds in the mean.

    Of a sharded model all processes call it, and the main one writes.
    """
    adapted = isinstance(model, PeftModel)
    if adapted:
        model = merged(model.float())
    # Whoever loads a reward model on these weights finds the end of a row by the padding.
    model.config.pad_token_id = tokenizer.pad_token_id
    _save(model, tokenizer, folder, dtype, keep_updates=adapted)


def save_policy(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype, base: ModelRef
) -> None:
    """Write an adapter that names the model ``base``, or a model's full weights in ``dtype``; with the tokenizer.

    Of a sharded model all processes call it, and the main one writes.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
        name_base(folder, base)
        tokenizer.save_pretrained(folder)
    else:
        _save(model, tokenizer, folder, dtype)


def name_base(folder: Path, base: ModelRef) -> None:
    """Let the adapter in a folder name the model that it was trained on, and record that model's fingerprint.

    peft would name the folder that the base was loaded from, and no revision of a model on the hub.
    """
    path = Path(base.path)
    named = {"base_model_name_or_path": str(path.resolve() if path.is_dir() else base.path), "revision": base.revision}
    write_json(folder / ADAPTER_CONFIG, read_json(folder / ADAPTER_CONFIG) | named)
    write_json(folder / BASE_RECORD_FILE, {"spec": base.spec, "kind": base.kind, "fingerprint": base.fingerprint})


def _save(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype, *, keep_updates: bool = False
) -> None:
    """``keep_updates``: round small changes so that their mean stays. Weights that all train are rounded to nearest, as
    autocast rounds them in training."""
    state = full_state(model)
    for name, weight in state.items():
        if weight.is_floating_point():  # counts and masks stay as they are
            state[name] = stochastically_rounded(weight, dtype, name) if keep_updates else weight.to(dtype)
    if not written_elsewhere(model):
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def write_as_it_is(model: Any, folder: Path) -> None:
    """Write a model's weights, or its adapter, in the precision that they have.

    Of a sharded model all processes call it, and the main one writes.
    """
    whole = {"state_dict": full_state(model)} if is_sharded(model) else {}
    if not written_elsewhere(model):
        model.save_pretrained(folder, **whole)


def write_training_record(folder: Path, **facts: object) -> None:
    """What a policy was trained with (arm, beta, reference fingerprint), beside its weights.

    Where several processes save a sharded model, the main one writes.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_json(folder / TRAINING_RECORD_FILE, facts)
