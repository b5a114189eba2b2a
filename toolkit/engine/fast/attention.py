"""Grouped-query attention for a CPU: the query heads of a group are rows of one product with the keys that they share.

transformers' eager attention repeats keys and values for every group of heads and takes the softmax in an fp32 copy;
torch's fused kernel computes a dense mask's blocks one by one. Neither is fast for the rows of a tree batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

# The name under which transformers knows this attention.
GROUPED_QUERY = "grouped"


@dataclass(frozen=True)
class PaddingMap:
    """Where the tokens of a batch without padding, [1, N], stand in the padded rows, [B, T], of its mask.

    Attention alone needs rows. All other layers treat each token by itself, and need not see the padding.
    """

    token_of_place: torch.Tensor  # [B * T] which token stands in each place of the rows; any token where there is none
    place_of_token: torch.Tensor  # [N] each token's place in the rows

    def to(self, device: torch.device) -> PaddingMap:
        return PaddingMap(self.token_of_place.to(device), self.place_of_token.to(device))

    def pad(self, tokens: torch.Tensor, n_rows: int) -> torch.Tensor:
        """[B, H, T, D] from [1, H, N, D], with gradients."""
        rows: torch.Tensor = _Pad.apply(tokens.transpose(1, 2)[0], self)  # type: ignore[no-untyped-call]
        return rows.view(n_rows, -1, *rows.shape[1:]).transpose(1, 2)

    def unpad(self, rows: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] from [B, T, ...]."""
        return rows.flatten(0, 1).index_select(0, self.place_of_token)[None]


class _Pad(torch.autograd.Function):
    """[B * T, ...] from [N, ...]. A padding place holds a copy, and what gradient it gets is dropped: that of
    ``index_select`` would be added to the original's."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, padding_map: PaddingMap) -> torch.Tensor:
        ctx.padding_map = padding_map
        return tokens.index_select(0, padding_map.token_of_place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(0, ctx.padding_map.place_of_token), None


def grouped_query_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    padding_map: PaddingMap | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """[B, T, H, D] attention of queries [B, H, T, D] to keys and values [B, H / G, S, D] under an additive mask.

    With ``padding_map`` the tensors come, and go, without the padding that the mask, [B, 1, T, T], has. The softmax is
    computed in fp32 and rounded to the products' precision, as eager attention has it. Whatever else a model asks for
    goes to transformers' sdpa.
    """
    if padding_map is not None and attention_mask is not None:
        query, key, value = (padding_map.pad(tensor, len(attention_mask)) for tensor in (query, key, value))
    if _is_additive(attention_mask) and not dropout and all(more.get(name) is None for name in SDPA_ALONE):
        assert attention_mask is not None
        output = _grouped_query(query, key, value, attention_mask, scaling)
    else:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    return output.contiguous() if padding_map is None else padding_map.unpad(output), None


# Arguments of a model that the product below has no answer to.
SDPA_ALONE = ("softcap", "position_bias", "cache")


def _is_additive(mask: torch.Tensor | None) -> bool:
    """Whether a mask is one of numbers to be added, the same for all heads."""
    return mask is not None and mask.is_floating_point() and mask.shape[1] == 1


def _grouped_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """[B, T, H, D] from [B, H, T, D] and [B, H / G, S, D] under [B, 1, T, S]."""
    batch, heads, rows, width = query.shape
    groups, columns = key.shape[1:3]
    scale = width**-0.5 if scaling is None else scaling
    # One head's rows behind another's: the group meets its keys in one product.
    query = (query * scale).reshape(batch, groups, -1, width)
    scores = torch.matmul(query, key.transpose(2, 3)).view(batch, groups, -1, rows, columns)
    if mask.dtype == scores.dtype:
        scores += mask[:, :, None]
    else:  # fp32's lowest number would be -inf in bf16, and a row of it NaN
        scores = scores + mask[:, :, None]
    weights = scores.softmax(-1).to(value.dtype).view(batch, groups, -1, columns)
    return torch.matmul(weights, value).view(batch, heads, rows, -1).transpose(1, 2)


def supports_grouped_query(model: Any) -> bool:
    """Whether a model's attention can be replaced, and is no more than a scaled, masked product."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return not _has_soft_cap(model) and all(m.is_backend_compatible() and m._supports_sdpa for m in modules)


def _has_soft_cap(model: Any) -> bool:
    """Whether attention's scores are capped (Gemma 2)."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def takes_padding_map(model: Any) -> bool:
    """Whether a model's attention takes ``padding_map``, and with it a batch without padding."""
    return name_of(model) == GROUPED_QUERY


def name_of(model: Any) -> str:
    """Transformers' name of the attention that a model computes with."""
    return str(model.config.get_text_config()._attn_implementation)


@contextmanager
def sdpa_for_eager(model: Any) -> Iterator[None]:
    """sdpa instead of eager attention, which repeats the keys for every group of heads at each token."""
    with _own_attention_again(model) as before:
        if before == "eager" and not _has_soft_cap(model):  # sdpa has no soft cap
            with suppress(ValueError):  # what transformers raises for a model without sdpa: it stays as it is
                model.set_attn_implementation("sdpa")
        yield


@contextmanager
def grouped_query(model: Any) -> Iterator[None]:
    """Attention without copies of the keys for every query head of a group, where a model can have it.

    For the products of single tokens: those of whole prompts would hold their attention's scores.
    """
    with _own_attention_again(model) as before:
        if before != GROUPED_QUERY and supports_grouped_query(model):
            model.set_attn_implementation(GROUPED_QUERY)
        yield


@contextmanager
def _own_attention_again(model: Any) -> Iterator[str]:
    """The name of the model's attention, which it has again at the end."""
    before = model.config._attn_implementation
    try:
        yield before
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


AttentionInterface.register(GROUPED_QUERY, grouped_query_attention)
AttentionMaskInterface.register(GROUPED_QUERY, eager_mask)
