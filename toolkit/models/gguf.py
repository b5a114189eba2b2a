"""GGUF files as model folders that transformers reads and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from toolkit.errors import ModelError, first_line
from toolkit.files import atomic_write
from toolkit.models.files import FIX, UNREADABLE, check_config

FEWEST_BITS = 1.0  # of a weight: the coarsest quantisation has 1.5


def _check_size(config: Any, file: Path) -> None:
    """Raises ModelError where a file is too small for the model that it describes, before memory is taken for it."""
    check_config(config.to_dict(), str(file))
    with torch.device("meta"):
        described: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    n_weights = sum(weight.numel() for weight in described.parameters())
    if file.stat().st_size * 8 < n_weights * FEWEST_BITS:
        what = f"this GGUF file is cut off: it describes {n_weights:,} weights and has {file.stat().st_size:,} bytes"
        raise ModelError(what, where=str(file), fix=FIX)


def convert_gguf(file: Path, target: Path) -> None:
    """Write a GGUF file's weights as a model folder in bf16, whole or not at all.

    transformers dequantises the file, but the result refuses ``save_pretrained``. So a second model is made from the
    configuration without the quantisation, and takes the weights.

    Raises ModelError where the file is damaged, cut off, or of an architecture that is not known.
    """
    name: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    name["trust_remote_code"] = False
    try:
        _check_size(AutoConfig.from_pretrained(**name), file)
        auto_class: Any = AutoModelForCausalLM
        loaded, report = auto_class.from_pretrained(**name, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**name)
    except UNREADABLE as error:
        raise ModelError(f"this GGUF file cannot be read: {first_line(error)}", where=str(file), fix=FIX) from error
    if report["missing_keys"]:
        raise ModelError(f"this GGUF file lacks {sorted(report['missing_keys'])[0]!r}", where=str(file), fix=FIX)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(loaded.config).from_dict(settings)
    with torch.device("meta"):  # random weights take seconds, and are overwritten
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.load_state_dict({name: weight.bfloat16() for name, weight in loaded.state_dict().items()}, assign=True)
    model.tie_weights()
    try:
        with atomic_write(target) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except OSError:
        if not (target / "config.json").is_file():  # else another process was quicker, and wrote the same
            raise
