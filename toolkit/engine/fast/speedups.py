"""The entrance to the fast room: other rooms install faster computations here, and name none of them.

The room holds what depends on private names of torch, transformers and peft (``private.py`` lists them). A model that
a computation does not suit keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from toolkit.engine.fast import adapters, attention
from toolkit.engine.fast.growing_cache import GrowingLayer

# The attentions of the models that were loaded, for the record of what a stage computed with.
ATTENTIONS: set[str] = set()


def default_attention() -> str:
    """The attention of models that are loaded without naming one: our own on a CPU, where a tree's mask is dense and
    rows are short."""
    return "sdpa" if torch.cuda.is_available() else attention.GROUPED_QUERY


def install(model: Any, *, replace_attention: bool = False) -> Any:
    """Give a model that was loaded, or got an adapter, the faster computations that suit it; returns the model.

    ``replace_attention``: also :func:`default_attention`, for a CPU's model that was loaded with eager attention.
    """
    if replace_attention and attention.supports_grouped_query(model):
        model.set_attn_implementation(attention.GROUPED_QUERY)
    adapters.fuse_lora_layers(model)
    ATTENTIONS.add(attention.name_of(model))
    return model


@contextmanager
def decoding(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Computes single tokens faster inside the context, and leaves the model as it was, bit for bit.

    ``model`` is the transformers model, without peft's wrapper; ``dtype`` is the precision that it computes in.
    """
    with adapters.merged_adapters(model, dtype), attention.sdpa_for_eager(model):
        yield


def row_cache(model: Any) -> DynamicCache | None:
    """An empty cache of keys and values whose rows can be selected; None where a model's state runs through the row."""
    cache = DynamicCache(config=model.config)
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    own = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    cache.layers = own
    return cache


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Make the cache one of these rows, by index or by a mask, in their order."""
    cache.batch_select_indices(rows)
