"""What LoRA adapters compute: leaner than peft does under autocast, or folded into the weights for sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.autograd.function import once_differentiable


def lean(adapted: Any) -> Any:
    """Let LoRA layers compute ``W x + s B A x`` under autocast without peft's copies of the activations.

    peft turns the input into the adapter's fp32, for autocast to round it again, and makes three tensors of the
    output's size where one is enough. What a layer does beyond that (dropout, DoRA, hooks, weights that are merged,
    quantised or trained, several adapters) and everything outside autocast stays peft's.
    """
    for module in adapted.modules():
        if type(module) is LoraLinear:
            module.__class__ = _LeanLinear
    return adapted


class _LeanLinear(LoraLinear):  # type: ignore[misc]
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        base = self.base_layer
        if (
            name not in self.lora_A
            or self.disable_adapters
            or self.merged
            or type(base) is not nn.Linear  # quantised weights are subclasses
            or "forward" in base.__dict__  # accelerate's offloading
            or base._forward_hooks
            or base._forward_pre_hooks
            or any(weight.requires_grad for weight in base.parameters())
            or getattr(self.lora_dropout[name], "p", 0.0) > 0.0
            or not _is_plain_lora(self)
            or args
            or kwargs
            or not torch.is_autocast_enabled(x.device.type)
        ):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _LowRank.apply(x, base.weight, base.bias, a, b, self.scaling[name])


class _LowRank(torch.autograd.Function):
    """[..., o] ``x W^T + s (x A^T) B^T + b`` from [..., i] in autocast's precision; W and b have no gradient.

    Each low-rank product is added to the large one in place, in the backward pass too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, a, b = (tensor.to(dtype) for tensor in (x, weight, a, b))
        out = F.linear(x, weight, None if bias is None else bias.to(dtype))
        low = x.flatten(0, -2) @ a.t()
        out.view(-1, out.shape[-1]).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        of_low = gradient @ b  # times s, which comes last: in fp32 where the weights are, so that it rounds nothing
        of_x = (gradient @ weight).addmm_(of_low, a, alpha=ctx.scaling).view_as(x) if ctx.needs_input_grad[0] else None
        of_a = (of_low.t() @ x.flatten(0, -2)).float() * ctx.scaling if ctx.needs_input_grad[3] else None
        of_b = (gradient.t() @ low).float() * ctx.scaling if ctx.needs_input_grad[4] else None
        return of_x, None, None, of_a, of_b, None


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """The active LoRA adapters folded into the weights, for rollouts; the exact weights come back afterwards.

    Unmerging by subtraction would leave rounding errors in bf16 weights at every rollout, so they are kept. The plain
    layers stand where peft's were: a decoded token would spend a fifth of its time in those.
    """
    places = [(owner, n, m) for owner in model.modules() for n, m in owner.named_children() if isinstance(m, LoraLayer)]
    layers = [layer for _, _, layer in places]
    if not all(_is_plain_lora(layer) for layer in layers) or any(
        isinstance(module, ModulesToSaveWrapper) for module in model.modules()
    ):
        yield model  # other kinds of adapters run as they are
        return
    kept = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, kept, strict=True):
            total = weight
            for name in () if layer.disable_adapters else layer.active_adapters:
                if name in layer.lora_A:
                    # In the base's precision, as the adapter's own products are in training; sums are fp32 inside.
                    a, b = layer.lora_A[name].weight.to(weight.dtype), layer.lora_B[name].weight.to(weight.dtype)
                    total = torch.addmm(total, b, a, alpha=layer.scaling[name])
            layer.get_base_layer().weight.data = total
        for owner, name, layer in places:
            setattr(owner, name, layer.get_base_layer())
        yield model
    finally:
        for (owner, name, layer), weight in zip(places, kept, strict=True):
            setattr(owner, name, layer)
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
