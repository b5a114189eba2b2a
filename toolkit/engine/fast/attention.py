"""Attention for a CPU: a group's query heads are further rows of one product with the keys that they share.

transformers' eager attention repeats keys and values for every group of heads and takes the softmax in an fp32 copy;
torch's fused kernel computes a dense mask's blocks one by one. Neither is fast for the rows of a tree batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

GROUPED = "grouped"


@dataclass(frozen=True)
class Rows:
    """Where the tokens of padded rows, [B, T], stand in a model's input without padding, [1, N].

    Everything but attention treats each token alone, and need not see the padding.
    """

    take: torch.Tensor  # [B * T] the token in each place of the rows; any one where there is none
    place: torch.Tensor  # [N] each token's place in the rows

    def to(self, device: torch.device) -> Rows:
        return Rows(self.take.to(device), self.place.to(device))


class _IntoRows(torch.autograd.Function):
    """[B * T, ...] from [N, ...]. A padding place holds a copy, and what gradient it gets is dropped: that of
    ``index_select`` would be added to the original's."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return tensor.index_select(0, rows.take)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(0, ctx.rows.place), None


def grouped(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree_rows: Rows | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """[B, T, H, D] attention of queries [B, H, T, D] to keys and values [B, H / G, S, D] under an additive mask.

    With ``tree_rows`` the tensors come, and go, without the padding that the mask, [B, 1, T, T], has. The softmax is
    computed in fp32 and rounded to the products' precision, as eager attention has it. Whatever else a model asks for
    goes to transformers' sdpa.
    """
    if tree_rows is not None and attention_mask is not None:
        size = (len(attention_mask), -1)
        query, key, value = (
            _IntoRows.apply(tensor.transpose(1, 2)[0], tree_rows).unflatten(0, size).transpose(1, 2)
            for tensor in (query, key, value)
        )
    batch, heads, rows, width = query.shape
    shared, columns = key.shape[1:3]
    simple = attention_mask is not None and attention_mask.is_floating_point() and attention_mask.shape[1] == 1
    if not simple or dropout or any(more.get(name) is not None for name in ("softcap", "position_bias", "cache")):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return _as_it_came(output, tree_rows), None
    scale = width**-0.5 if scaling is None else scaling
    # One head's rows behind another's: the group meets its keys in one product.
    query = (query * scale).reshape(batch, shared, -1, width)
    scores = torch.matmul(query, key.transpose(2, 3)).view(batch, shared, -1, rows, columns)
    assert attention_mask is not None
    if attention_mask.dtype == scores.dtype:
        scores += attention_mask[:, :, None]
    else:  # fp32's lowest number would be -inf in bf16, and a row of it NaN
        scores = scores + attention_mask[:, :, None]
    weights = scores.softmax(-1).to(value.dtype).view(batch, shared, -1, columns)
    output = torch.matmul(weights, value).view(batch, heads, rows, -1).transpose(1, 2)
    return _as_it_came(output, tree_rows), None


def _as_it_came(output: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    return output.contiguous() if rows is None else output.flatten(0, 1).index_select(0, rows.place)[None]


def takes_grouped(model: Any) -> bool:
    """Whether a model's attention is one that can be replaced, and no more than a scaled, masked product."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return not capped and all(part.is_backend_compatible() and part._supports_sdpa for part in parts)


AttentionInterface.register(GROUPED, grouped)
AttentionMaskInterface.register(GROUPED, eager_mask)
