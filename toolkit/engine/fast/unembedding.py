"""The product with the unembedding of a large vocabulary on a CPU in fp32, in parts of the vocabulary.

MKL multiplies few states with tens of thousands of outputs at little more than half of the pace that it has for a
thousand of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolkit.engine.fast.transforms import transforms_active

WIDE = 8192  # outputs from which a product is computed in parts
PART = 512  # outputs of a part


def split_unembedding(model: Any) -> None:
    """Let the unembedding of a model compute in parts, where it is a linear layer of many outputs and no more."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is nn.Linear and head.out_features >= WIDE:
        head.__class__ = _WideLinear


class _WideLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters())
        if (
            trains
            or type(self.weight) is not nn.Parameter  # a shard of several devices
            or input.device.type != "cpu"
            or not input.dtype == self.weight.dtype == torch.float32
            or torch.is_autocast_enabled("cpu")
            or transforms_active()
        ):
            return super().forward(input)
        product: torch.Tensor = _WideProduct.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product


class _WideProduct(torch.autograd.Function):
    """[..., V] ``x W^T + b`` from [..., d]; W and b have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = x.new_empty(*x.shape[:-1], len(weight))  # no view: callers may change what they get in place
        rows, out_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, out))
        for into, part in zip(torch.split(out_rows, PART, dim=1), torch.split(weight, PART), strict=True):
            torch.mm(rows, part.t(), out=into)
        if bias is not None:
            out += bias
        ctx.save_for_backward(weight)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        [weight] = ctx.saved_tensors
        return gradient @ weight, None, None
