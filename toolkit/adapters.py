"""What LoRA adapters compute: leaner than peft does under autocast, or folded into the weights for sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


def lean(adapted: Any) -> Any:
    """Let LoRA layers compute ``W x + s B A x`` under autocast without peft's copies of the activations.

    peft turns the input into the adapter's fp32, for autocast to round it again, and makes three tensors of the
    output's size where one is enough. What a layer does beyond that (DoRA, biases, weights that are merged, several
    adapters) and everything outside autocast stays peft's.
    """
    for module in adapted.modules():
        if type(module) is LoraLinear:
            module.__class__ = _LeanLinear
    return adapted


class _LeanLinear(LoraLinear):  # type: ignore[misc]
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if (
            name not in self.lora_A
            or self.disable_adapters
            or self.merged
            or not isinstance(self.base_layer, nn.Linear)
            or not _is_plain_lora(self)
            or args
            or kwargs
            or not torch.is_autocast_enabled(x.device.type)
        ):
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        low = self.lora_A[name](self.lora_dropout[name](x)).flatten(0, -2)
        # In place: a linear layer's output is not needed for its gradient.
        result.view(-1, result.shape[-1]).addmm_(
            low.to(result.dtype), self.lora_B[name].weight.t().to(result.dtype), alpha=self.scaling[name]
        )
        return result


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """The active LoRA adapters folded into the weights, for rollouts; the exact weights come back afterwards.

    Unmerging by subtraction would leave rounding errors in bf16 weights at every rollout, so they are kept.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not all(_is_plain_lora(layer) for layer in layers) or any(
        isinstance(module, ModulesToSaveWrapper) for module in model.modules()
    ):
        yield model  # other kinds of adapters run as they are
        return
    kept = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, kept, strict=True):
            total = weight.float()
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    total = total + layer.get_delta_weight(name).float()
            layer.get_base_layer().weight.data = total.to(weight.dtype)
        with _adapters_off(model) if layers else nullcontext():
            yield model
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.get_base_layer().weight.data = weight


def _is_plain_lora(layer: LoraLayer) -> bool:
    """Whether ``W + sum of deltas`` is all that the layer's active adapters do."""
    return (
        isinstance(layer.get_base_layer(), nn.Linear)
        and not layer.lora_embedding_A
        and not any(
            layer.use_dora.get(name) or layer.lora_bias.get(name) or name in layer.lora_variant
            for name in layer.active_adapters
        )
    )


@contextmanager
def _adapters_off(model: Any) -> Iterator[None]:
    """peft's ``disable_adapter`` for whichever module carries the adapters."""
    for owner in model.modules():
        if isinstance(owner, PeftModel):
            with owner.disable_adapter():
                yield
            return
    yield
