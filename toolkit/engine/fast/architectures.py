"""Kinds of architectures, by the names that transformers gives to the types of models."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

# Those that are trained by masking words: their tokens see what follows.
ENCODERS = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def carries_state(model: Any) -> bool:
    """Whether transformers says of this model's class that it carries a state along a row, as Mamba does."""
    return bool(model._is_stateful)
