"""The files of a model's folder, looked at before a library reads them: their form, their sizes, where they lead."""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from toolkit.errors import ModelError, StoreError
from toolkit.files import parse_json, read_json

CONFIG, ADAPTER_CONFIG, GENERATION_CONFIG = "config.json", "adapter_config.json", "generation_config.json"
REWARD_HEAD_FILE = "reward_head.json"
BASE_RECORD_FILE = "base.json"  # beside an adapter: what it was trained on
FIX = "use a complete copy of the model"
# What reading a damaged, foreign or half-downloaded model raises, by library.
UNREADABLE = (
    *(OSError, ValueError, RuntimeError, LookupError, AttributeError, ImportError, SafetensorError),
    *(TypeError, ArithmeticError, EOFError, StrictDataclassError, struct.error, pickle.UnpicklingError),
)
# A larger value is damage. Libraries allocate by it before they look at the weights.
LARGEST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 100_000_000,
}
# What a header has beside weights: its own facts, and tables of positions, which older versions of transformers saved.
COUNTS = ("__metadata__", "position_ids", "token_type_ids", "num_batches_tracked")
# Causal masks, which these saved, too, for GPT-2, GPT-J, GPT-Neo, GPT-NeoX and CodeGen: no weight has their types.
MASKS = ("attn.bias", "attention.bias", "attn.causal_mask")
TYPES_OF_MASKS = ("BOOL", "U8")
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format itself
_OTHER_HEADS = re.compile(
    "For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)|RewardModel"
)


def check_weights(folder: Path) -> None:
    """Raises ModelError where the weights of a model or an adapter are damaged, or lead out of its folder."""
    if (folder / GENERATION_CONFIG).is_file():
        _check_ends(model_json(folder / GENERATION_CONFIG), str(folder / GENERATION_CONFIG))
    for index in folder.glob("*.safetensors.index.json"):
        _check_index(index)
    quantised = (folder / CONFIG).is_file() and model_json(folder / CONFIG).get("quantization_config")
    for weights in folder.glob("*.safetensors"):
        _check_header(weights, floats=not quantised)


def model_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises ModelError where it is damaged."""
    try:
        return read_json(path, fix=FIX)
    except StoreError as error:
        raise ModelError(error.what, where=error.where, fix=error.fix) from error


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for an architecture that is no name, and for sizes that no model has."""
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError("architectures is no list of names", where=where, fix=FIX)
    sections = [section for section in (config, config.get("text_config")) if isinstance(section, Mapping)]
    for section in sections:
        for name, most in LARGEST.items():
            value = section.get(name)
            # Some architectures have one value for each layer.
            if isinstance(value, int | float | str) and not (type(value) is int and 0 < value <= most):
                raise ModelError(f"{name} must be a whole number from 1 to {most:,}", where=where, fix=FIX)


def _check_ends(settings: Mapping[str, Any], where: str) -> None:
    ends = settings.get("eos_token_id")
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [] if ends is None else [ends])):
        raise ModelError("eos_token_id must be a token's id, or a list of them", where=where, fix=FIX)


def other_head(config: Mapping[str, Any]) -> str | None:
    """The architecture of a model that has another head than a language model's; None for a policy."""
    return next((name for name in config.get("architectures") or () if _OTHER_HEADS.search(name)), None)


def _check_index(path: Path) -> None:
    """The index of split weights names files that lie beside it."""
    files = model_json(path).get("weight_map")
    if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files.values()) or not files:
        raise ModelError("the index of the weights names no files", where=str(path), fix=FIX)
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ModelError(f"the index of the weights leads out of its folder: {name!r}", where=str(path), fix=FIX)
        if not (path.parent / name).is_file():
            raise ModelError(f"the weights lack the file {name!r}", where=str(path), fix=FIX)


def _check_header(path: Path, *, floats: bool) -> None:
    """The header of a safetensors file. ``floats``: weights are floating-point numbers."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = file.read(length) if 0 < length <= LONGEST_HEADER else b""
    try:
        if len(text) < max(length, 1):
            raise ValueError("it is cut off, or is no safetensors file")
        header = parse_json(text.decode("utf-8"))
        if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
            raise ValueError("its header is of another form")
    except ValueError as error:
        raise ModelError(f"the weights cannot be read: {error}", where=str(path), fix=FIX) from error
    for name, entry in header.items():
        dtype = entry.get("dtype")
        is_mask = dtype in TYPES_OF_MASKS and name.endswith(MASKS)
        if floats and not is_mask and not name.endswith(COUNTS) and not str(dtype).startswith(("F", "BF")):
            raise ModelError(f"the weight {name!r} is of type {dtype}, and not a float", where=str(path), fix=FIX)


def check_training_record(record: Mapping[str, Any], where: str) -> None:
    """Raises ModelError where what a policy was trained with has a value of another type."""
    beta, step, conversational = (record.get(name) for name in ("beta", "step", "conversational"))
    if not (conversational is None or isinstance(conversational, bool)):
        raise ModelError("conversational must be true or false", where=where, fix=FIX)
    if beta is not None and not (type(beta) in (int, float) and math.isfinite(beta)):
        raise ModelError("beta must be a finite number", where=where, fix=FIX)
    if step is not None and type(step) is not int:
        raise ModelError("step must be a whole number", where=where, fix=FIX)
