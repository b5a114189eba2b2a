"""Decoding with tensors that keep their shape and place, which is what a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from toolkit.engine.fast.growing_cache import GrowingLayer


class FixedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values [R, H, L, D] with room for all tokens.

    New ones are written at ``place`` [1], which stands on the device, so that a graph can be replayed at the next one.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.place, self.is_initialized = keys, values, place, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        # Under autocast the first keys of a cache may be float32 and its values bfloat16, or turn so on the way.
        self.keys.index_copy_(2, self.place, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.place, value_states.to(self.values.dtype))
        return self.keys, self.values


def can_be_fixed(cache: Any, length: int) -> bool:
    """Whether rows of ``length`` tokens are keys and values of all their tokens in each layer of such a cache."""
    return all(
        type(layer) is GrowingLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= length)
        for layer in cache.layers
    )


def fixed_cache(like: Any, n_rows: int, length: int, place: torch.Tensor) -> DynamicCache:
    """A cache of zeros for ``n_rows`` of ``length`` tokens, of the heads and precision of a filled one."""

    def room(old: torch.Tensor) -> torch.Tensor:
        return old.new_zeros(n_rows, old.shape[1], length, old.shape[3])

    cache = DynamicCache()
    cache.layers = [FixedLayer(room(layer.keys), room(layer.values), place) for layer in like.layers]
    return cache


def fill(cache: Any, source: Any, rows: torch.Tensor, n_tokens: int) -> None:
    """Write the first tokens of these rows of a cache into a fixed one."""
    for into, layer in zip(cache.layers, source.layers, strict=True):
        into.keys[:, :, :n_tokens] = layer.keys[rows, :, :n_tokens]
        into.values[:, :, :n_tokens] = layer.values[rows, :, :n_tokens]


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """What does the same as ``step`` on the current GPU, as the replay of a graph. It calls ``step`` two times.

    Raises RuntimeError where ``step`` makes the host wait, before a graph is begun.
    """
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    mode = torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # what libraries set up on a first call
        try:
            torch.cuda.set_sync_debug_mode("error")
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
