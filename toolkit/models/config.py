"""Configurations of models, read without their weights and without torch."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from toolkit.errors import ModelError
from toolkit.models.files import UNREADABLE
from toolkit.models.remote_code import remote_code_allowed, unreadable
from toolkit.models.resolve import ModelRef, below_adapters


def read_config(ref: ModelRef) -> Any:
    """The configuration of a full model. Raises ModelError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(ref.path, revision=ref.revision, trust_remote_code=remote_code_allowed())
    except UNREADABLE as error:
        raise unreadable_model(ref, error) from error


def refuse_quantised(ref: ModelRef, where: str) -> None:
    """Raises ModelError for a quantised model, or an adapter on one: what trains is written as full weights, of which
    the codes of a quantisation are none. ``where`` names the setting."""
    quantisation = getattr(read_config(below_adapters(ref)), "quantization_config", None)
    if quantisation:
        raise ModelError(
            f"{ref.spec!r} is quantised (quantization_config in its config.json): it cannot be trained and written as "
            "full weights",
            where=where,
            fix="name the model that it was made from; a GGUF file (gguf:FILE) is dequantised",
        )


def unreadable_model(ref: ModelRef, error: Exception) -> ModelError:
    """The error of a model that cannot be loaded."""
    fix = "check that the folder is complete and belongs to this kind of model"
    return unreadable(f"{ref.spec!r} cannot be loaded", ref.spec, ref.path, error, fix)
