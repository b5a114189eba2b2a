"""GGUF files as model folders that transformers reads and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.files import atomic_write


def convert_gguf(file: Path, target: Path) -> None:
    """Write a GGUF file's weights as a model folder in bf16, whole or not at all.

    transformers dequantises the file, but the result refuses ``save_pretrained``. So a second model is made from the
    configuration without the quantisation, and takes the weights.
    """
    name = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(loaded.config).from_dict(settings)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    try:
        with atomic_write(target) as partial:
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(**name).save_pretrained(partial)
    except OSError:
        if not (target / "config.json").is_file():  # else another process was quicker, and wrote the same
            raise
