"""GGUF files as plain model folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


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
    AutoTokenizer.from_pretrained(**name).save_pretrained(partial)
    if not target.exists():
        os.rename(partial, target)
    shutil.rmtree(partial, ignore_errors=True)
