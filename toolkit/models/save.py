"""Writing policies and reward models, with a record of their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from toolkit.files import read_json, write_json
from toolkit.models.resolve import TRAINING_RECORD_FILE


def merge_and_save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Write a model's full weights. An adapter is merged in fp32 first, so that rounding happens once."""
    if isinstance(model, PeftModel):
        model = model.float().merge_and_unload()
    # Whoever loads a reward model on these weights finds the end of a row by the padding.
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_policy(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype, base: Path
) -> None:
    """Write an adapter that names ``base`` (a folder, or a hub id), or a model's full weights in ``dtype``; with the
    tokenizer."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
        path = folder / "adapter_config.json"
        # peft would name the folder that the base was loaded from, which may be a link of the stage's.
        write_json(path, read_json(path) | {"base_model_name_or_path": str(base.resolve() if base.is_dir() else base)})
    else:
        model.save_pretrained(
            folder, state_dict={name: weight.to(dtype) for name, weight in model.state_dict().items()}
        )
    tokenizer.save_pretrained(folder)


def write_training_record(folder: Path, **facts: object) -> None:
    """What a policy was trained with (arm, beta, reference fingerprint), beside its weights."""
    write_json(folder / TRAINING_RECORD_FILE, facts)
