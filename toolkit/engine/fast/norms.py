"""RMS norms with frozen weights as one step of the graph, where transformers makes about ten of fp32 tensors.

On a CPU, where those tensors are what a norm costs.
"""

from __future__ import annotations

import copy
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def lean(model: Any) -> Any:
    """Let norms that compute ``w * rounded(x / rms(x))`` (Llama, Mistral, Qwen and others) do so in fewer tensors.

    The result is the same bit for bit. Norms whose weights are trained stay the model's own, and norms of another
    kind (Gemma's ``1 + w``) do always.
    """
    for module in model.modules():
        if _is_plain(module):
            module.__class__ = _lean_class(type(module))
    return model


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes just that: decided on numbers, since names do not say it."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or isinstance(module, _LeanRMSNorm) or weight is None:
        return False
    if not isinstance(getattr(module, "variance_epsilon", None), float) or "forward" in vars(module):
        return False
    if weight.device.type != "cpu":
        return False
    twin = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    values = 0.5 + torch.rand(weight.shape, generator=generator)
    x = torch.randn(4, *weight.shape, generator=generator)
    try:
        with torch.no_grad():
            for dtype, of_weight in product((torch.float32, torch.bfloat16), repeat=2):
                twin.weight.data = values.to(of_weight)
                own = twin(x.to(dtype))
                ours, _ = _normed(x.to(dtype), twin.weight, twin.variance_epsilon)
                if own.dtype != ours.dtype or not torch.equal(own, ours):
                    return False
    except Exception:  # kernels of somebody else's, which may run on their own device alone
        return False
    return True


@cache
def _lean_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_LeanRMSNorm, cls), {"plain": cls})


def _new(cls: type[nn.Module]) -> nn.Module:
    lean_class = _lean_class(cls)
    return lean_class.__new__(lean_class)


class _LeanRMSNorm(nn.Module):
    plain: type[nn.Module]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        if weight.requires_grad or x.device.type != "cpu":
            return super().forward(x)  # type: ignore[no-any-return]
        if not torch.is_grad_enabled():  # a decoded token's norm is so small that the graph's own step would show
            return _normed(x, weight, self.variance_epsilon)[0]
        return _RMSNorm.apply(x, weight, self.variance_epsilon)  # type: ignore[no-any-return]

    def __reduce__(self) -> Any:  # the class is made while running, so a pickle names the one it was made from
        return _new, (self.plain,), self.__dict__


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., d] ``w * (x / sqrt(mean(x^2) + eps))`` (Zhang and Sennrich 2019, equation 4), and [..., 1] what x was
    multiplied with. The quotient is computed in fp32 and rounded to x's precision."""
    wide = x.to(torch.float32, copy=True)
    inverse = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return weight * wide.mul_(inverse).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    """:func:`_normed` with a gradient for x; w has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        # Of the quotient, rounded as the graph's own would be.
        of_unit = (gradient * weight).to(x.dtype).to(torch.float32, copy=True)
        wide = x.float()
        inner = (of_unit * wide).sum(-1, keepdim=True) * inverse.pow(3) / -x.shape[-1]
        return of_unit.mul_(inverse).addcmul_(wide, inner).to(x.dtype), None, None
