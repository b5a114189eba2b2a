"""LoRA layers of peft: a faster forward pass under autocast, merged weights for sampling, which adapter is active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.autograd.function import once_differentiable

from toolkit.engine.fast.rounding import stochastically_rounded

# Their weights are zero where a new adapter changes nothing yet.
UP_PROJECTIONS = ("lora_B", "lora_embedding_B")


def fuse_lora_layers(model: nn.Module) -> None:
    """Let LoRA layers compute ``W x + s B A x`` without peft's copies of the activations.

    peft converts the input to the adapter's fp32, which autocast rounds again, and makes three tensors of the
    output's size where one is enough. What a layer does beyond that (dropout, DoRA, hooks, weights that are merged,
    quantised or trained, several adapters) stays peft's, and so do mixed precisions outside autocast.
    """
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = _FusedLoraLinear


class _FusedLoraLinear(LoraLinear):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self._is_fusible():
            return super().forward(x, *args, **kwargs)
        [name] = self.active_adapters
        base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
        dtypes = {x.dtype, base.weight.dtype, a.weight.dtype, b.weight.dtype}
        if len(dtypes) == 1 and (x.dtype == torch.float64 or not _is_autocast_enabled(x.device.type)):
            dtype = x.dtype
        elif torch.float64 not in dtypes and _is_autocast_enabled(x.device.type):  # which leaves fp64 as it is
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            return super().forward(x)
        product: torch.Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, a.weight, b.weight, self.scaling[name], dtype
        )
        return product

    def _is_fusible(self) -> bool:
        """Whether one adapter is active and its low-rank product, added to a frozen one, is all that is computed."""
        names = self.active_adapters
        if (
            len(names) != 1
            or names[0] not in self.lora_A
            or self.disable_adapters
            or self.merged
            or not _is_low_rank_sum(self)
        ):
            return False
        base, dropout = self.base_layer, self.lora_dropout[names[0]]
        return (
            all(type(layer) is nn.Linear for layer in (base, self.lora_A[names[0]], self.lora_B[names[0]]))
            and all(map(_is_bare, (base, dropout, self.lora_A[names[0]], self.lora_B[names[0]])))
            and getattr(dropout, "p", 0.0) == 0.0
            and not any(weight.requires_grad for weight in base.parameters())
            and not _transforms_active()
        )


def _is_autocast_enabled(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _is_bare(module: nn.Module) -> bool:
    """Whether a module computes what its class says, and nothing else looks on: it has no hooks, and accelerate's
    offloading did not replace ``forward``."""
    return "forward" not in vars(module) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _transforms_active() -> bool:
    """Whether torch.func transforms, or torch.jit.trace records, what is computed.

    The former ask an ``autograd.Function`` for further methods, and a trace that has one cannot be saved.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch._C._are_functorch_transforms_active()


class _LoraProduct(torch.autograd.Function):
    """[..., o] ``x W^T + s (x A^T) B^T + b`` from [..., i] in the precision ``dtype``; W and b have no gradient.

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
        dtype: torch.dtype,
    ) -> torch.Tensor:
        x, weight, a, b = (tensor.to(dtype) for tensor in (x, weight, a, b))
        out = F.linear(x, weight, None if bias is None else bias.to(dtype))
        low = _rows(x) @ a.t()
        out.view(-1, out.shape[-1]).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return out.detach()  # no view, which a bias makes of it: models change what they get in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        gradient, exact = _rows(gradient), torch.promote_types(x.dtype, torch.float32)
        of_low = gradient @ b  # times s, which comes last: in fp32 where the weights are, so that it rounds nothing
        of_x = (gradient @ weight).addmm_(of_low, a, alpha=ctx.scaling).view_as(x) if ctx.needs_input_grad[0] else None
        of_a = (of_low.t() @ _rows(x)).to(exact) * ctx.scaling if ctx.needs_input_grad[3] else None
        of_b = (gradient.t() @ low).to(exact) * ctx.scaling if ctx.needs_input_grad[4] else None
        return of_x, None, None, of_a, of_b, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[n, i] from [..., i]."""
    return x.reshape(-1, x.shape[-1])


@contextmanager
def merged_adapters(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """The active LoRA adapters are part of the weights inside the context; after it the exact weights are back.

    ``dtype`` is the precision of the products where it is lower than that of the weights, as under autocast. Merged
    weights are rounded to it stochastically: rounding to nearest would lose most of an update that is small beside the
    distance of two numbers, and the samples would come from a policy nearer to the base than the one in training.

    Unmerging by subtraction would leave rounding errors in bf16 weights at every rollout, so the parameters are
    exchanged; an embedding that is tied to one keeps it. Each peft layer gives its place to the linear layer that it
    wraps, since its own forward costs time for each token.
    """
    layers: list[tuple[nn.Module, str, Any]] = [
        (owner, name, layer)
        for owner in model.modules()
        for name, layer in owner.named_children()
        if isinstance(layer, LoraLayer)
    ]
    if not all(_is_low_rank_sum(layer) for _, _, layer in layers) or any(
        isinstance(module, ModulesToSaveWrapper) for module in model.modules()
    ):
        yield  # other kinds of adapters run as they are
        return
    weights = [layer.get_base_layer().weight for _, _, layer in layers]
    paths = {layer: path for path, layer in model.named_modules()}
    try:
        for (owner, name, layer), weight in zip(layers, weights, strict=True):
            merged = _merged_weight(layer, weight.detach(), dtype, paths[layer])
            layer.get_base_layer().weight = nn.Parameter(merged, requires_grad=False)
            setattr(owner, name, layer.get_base_layer())
        yield
    finally:
        for (owner, name, layer), weight in zip(layers, weights, strict=True):
            setattr(owner, name, layer)
            layer.get_base_layer().weight = weight


def merge_into_low_precision(model: nn.Module) -> None:
    """Put the active adapters into weights in 16 bits as sampling does, for good: the adapters then add nothing.

    peft, which merges the rest, would round to nearest. Layers with adapters of other kinds stay as they are.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not _is_low_rank_sum(layer) or layer.merged or layer.disable_adapters:
            continue
        base: Any = layer.get_base_layer()
        if base.weight.dtype in (torch.bfloat16, torch.float16):
            base.weight.data = _merged_weight(layer, base.weight.detach(), base.weight.dtype, path)
            ups: Any = layer.lora_B
            for name in ups:
                nn.init.zeros_(ups[name].weight)


def _merged_weight(layer: Any, weight: torch.Tensor, dtype: torch.dtype, path: str) -> torch.Tensor:
    """[o, i] ``W + sum of s B A`` over the active adapters, of the layer with this path in its model.

    Numbers of the weight's precision, or of ``dtype`` where that is lower.
    """
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return weight
    lower = weight.dtype != torch.float64 and torch.finfo(dtype).eps > torch.finfo(weight.dtype).eps
    target = dtype if lower else weight.dtype
    exact = weight.to(target).to(torch.promote_types(target, torch.float32))
    with torch.autocast(weight.device.type, enabled=False):
        for name in active:
            a, b = (low[name].weight.to(exact.dtype) for low in (layer.lora_A, layer.lora_B))
            exact = torch.addmm(exact, b, a, alpha=layer.scaling[name])
    return stochastically_rounded(exact, target, f"{path}.weight").to(weight.dtype)


def _is_low_rank_sum(layer: LoraLayer) -> bool:
    """Whether ``W + sum of s B A`` is all that the layer's active adapters make of a linear layer."""
    return (
        isinstance(layer.get_base_layer(), nn.Linear)
        and not layer.lora_embedding_A
        and not any(
            layer.use_dora.get(name) or layer.lora_bias.get(name) or name in layer.lora_variant
            for name in layer.active_adapters
        )
    )


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The layers that have LoRA adapters."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def adapted_layers(model: nn.Module) -> list[str]:
    """The names of the layers that have adapters of any kind."""
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def activate(layers: Sequence[LoraLayer], adapter: str | None) -> None:
    """Make one adapter the only active one of these layers; None switches all of them off.

    peft changes which weights have gradients with it: those of the active adapter.
    """
    for layer in layers:
        layer.enable_adapters(adapter is not None)
        if adapter is not None:
            layer.set_adapter(adapter)


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """The low-rank weights of one adapter."""
    # Those of an embedding are parameters, not modules: their names end with the adapter's.
    named = model.named_parameters()
    return [weight for name, weight in named if f".{adapter}." in f"{name}." and is_adapter_weight(name)]


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA adapter."""
    return ".lora_" in name


def is_trained(adapter_state: dict[str, torch.Tensor]) -> bool:
    """Whether an adapter of these weights, by name, changes what the model computes."""
    return any(
        bool(weight.any()) for name, weight in adapter_state.items() if any(part in name for part in UP_PROJECTIONS)
    )


def trained_in_full(model: nn.Module, adapter: str) -> dict[str, nn.Module]:
    """Path in the model without adapters -> what an adapter trains in full there (``modules_to_save``)."""
    whole = model.get_base_model()  # type: ignore[operator]
    return {
        name: module.modules_to_save[adapter]
        for name, module in whole.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }


def trained_copy(module: nn.Module) -> nn.Module:
    """What stands for a module that an adapter trains in full (``modules_to_save``); any other module is itself."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    [adapter] = module.active_adapters
    return module.modules_to_save[adapter]
