"""What a loaded model is: its backbone, precision, device, attention window and positions; and dropout turned off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from toolkit.engine.fast.architectures import ENCODERS, carries_state
from toolkit.engine.fast.processor import AUTO, fastest_dtype
from toolkit.errors import NotFiniteError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Layers in which a token sees what the mask lets it see.
ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}


def torch_dtype(name: str) -> torch.dtype:
    """The precision of that name: ``auto``, ``bfloat16`` or ``float32``."""
    return DTYPES[fastest_dtype() if name == AUTO else name]


def check_finite(model: nn.Module, spec: str) -> None:
    """Raises NotFiniteError naming the first weight that is NaN or infinite."""
    for name, weight in model.named_parameters():
        # The extremes of a tensor with a NaN are NaN, and take a small part of the time of looking at each number.
        if weight.numel() and not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            raise NotFiniteError(
                "this model has weights that are not finite", where=f"{spec}: {name}", fix="use an earlier checkpoint"
            )


def disable_dropout(model: Any) -> Any:
    """Turn dropout off in training mode too, and return the model: PPO's ratio must be 1 before the first update.

    Rates stand in dropout modules, in attributes of other modules that copied them out of the configuration (OPT), and
    in the configuration itself, which attention reads. The rates at which whole layers are skipped are among them.
    """
    for module in model.modules():
        if isinstance(module, DROPOUTS):
            module.p = 0.0
        _zero_dropout_rates(module)
    for config in (model.config, model.config.get_text_config()):
        _zero_dropout_rates(config)
    return model


def _zero_dropout_rates(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)


@contextmanager
def precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """The autocast under which every forward pass runs: of training, sampling, reference and evaluation."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


def parameter_count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def best_device() -> torch.device:
    """This process's accelerator where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def inner(model: Any) -> Any:
    """The transformers model inside peft's wrapper; its adapters stay in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_encoder(config: Any) -> bool:
    """Whether a model of this configuration is an encoder (BERT style), whose tokens see those that follow."""
    return config.model_type in ENCODERS and not getattr(config, "is_decoder", False)


def backbone(model: Any) -> nn.Module:
    """The model without its head."""
    whole = inner(model)
    without_head: nn.Module = getattr(whole, whole.base_model_prefix)
    return without_head


def other_layers(model: Any) -> str | None:
    """The layers in which a token may see what a mask hides, in words; None where all are attention.

    Convolutions and linear attention carry a state from each token to the next one of its row. transformers gives them
    no mask, or one that knows padding alone.
    """
    whole = inner(model)
    config = whole.config.get_text_config()
    kinds = [*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())]
    if others := sorted({*kinds} - ATTENTION_LAYERS):
        return f"layers of the kind {', '.join(others)}"
    return "a state that runs through a row" if not kinds and carries_state(whole) else None


def attention_window(model: Any) -> int | None:
    """The smallest window of the model's layers, in tokens that a token attends to, itself included; None without."""
    config = inner(model).config.get_text_config()
    if all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ["unknown"]):
        return None
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    local = "local" in (getattr(config, "attention_layers", None) or ())  # GPT-Neo
    windows = (sliding, getattr(config, "attention_chunk_size", None), config.window_size if local else None)
    return min((window for window in windows if window), default=None)


def learned_positions(model: Any) -> int | None:
    """How many tokens a model with a table of positions can read; None where positions are computed."""
    whole = inner(model)
    limit: int | None = getattr(whole.config.get_text_config(), "max_position_embeddings", None)
    if not limit:
        return None
    words = whole.get_input_embeddings()
    for module in whole.modules():
        # Some tables have two rows more: for an offset (OPT), or for the padding before the first (RoBERTa).
        if isinstance(module, nn.Embedding) and module is not words and 0 <= module.num_embeddings - limit <= 2:
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(min(limit, module.num_embeddings - before))
    return None
