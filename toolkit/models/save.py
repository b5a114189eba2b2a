"""Writing policies and reward models, with a record of their training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from toolkit.errors import ModelError
from toolkit.files import read_json, write_json
from toolkit.models.files import FIX, model_json
from toolkit.models.resolve import REWARD_HEAD_FILE, TRAINING_RECORD_FILE

# Prompts whose SFT samples get a mean score of 0. The mean of 128 has a standard error of 0.09 standard deviations.
CENTRING_PROMPTS = 128


def reward_mean(folder: str | Path) -> float:
    """What is subtracted from a reward model's raw score, as its training stage measured it; 0 for any other model."""
    path = Path(folder) / REWARD_HEAD_FILE
    mean: object = model_json(path).get("mean") if path.is_file() else 0.0
    if not isinstance(mean, int | float) or not math.isfinite(mean):
        raise ModelError("the mean of the scores must be a finite number", where=str(path), fix=FIX)
    return float(mean)


@dataclass(frozen=True)
class SampleLaw:
    """How the samples were drawn whose mean score is 0."""

    temperature: float
    max_new_tokens: int


def centring_law(folder: str | Path) -> SampleLaw | None:
    """The law of the samples that a reward model was centred on; None where its stage did not centre it."""
    path = Path(folder) / REWARD_HEAD_FILE
    law = model_json(path).get("samples") if path.is_file() else None
    if law is None:
        return None
    try:
        return SampleLaw(float(law["temperature"]), int(law["max_new_tokens"]))
    except (TypeError, ValueError, LookupError) as error:
        raise ModelError("the law of the samples is damaged", where=str(path), fix=FIX) from error


def write_reward_mean(folder: Path, mean: float, law: SampleLaw | None = None) -> None:
    write_json(folder / REWARD_HEAD_FILE, {"mean": mean} | ({"samples": asdict(law)} if law is not None else {}))


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
    """Write an adapter that names ``base``, or a model's full weights in ``dtype``; with the tokenizer."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
        path = folder / "adapter_config.json"
        # peft would name the folder that the base was loaded from, which may be a link of the stage's.
        write_json(path, read_json(path) | {"base_model_name_or_path": str(base.resolve())})
    else:
        model.save_pretrained(
            folder, state_dict={name: weight.to(dtype) for name, weight in model.state_dict().items()}
        )
    tokenizer.save_pretrained(folder)


def write_training_record(folder: Path, **facts: object) -> None:
    """What a policy was trained with (arm, beta, reference fingerprint), beside its weights."""
    write_json(folder / TRAINING_RECORD_FILE, facts)
