"""Grouped-query attention against a loop over queries, with and without padding, and the models that take it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from toolkit.engine.fast import attention
from toolkit.engine.fast.attention import GROUPED_QUERY, PaddingMap, grouped_query_attention
from toolkit.models.load import ModelSection
from toolkit.models.load import attention as chosen_attention

HEADS, SHARED, WIDTH = 6, 2, 8
MODULE = SimpleNamespace(num_key_value_groups=HEADS // SHARED, is_causal=True)


def qkv(rows: int, columns: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, HEADS, rows, WIDTH), (batch, SHARED, columns, WIDTH), (batch, SHARED, columns, WIDTH)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def additive(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill_(~allowed, torch.finfo(torch.float64).min)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scaling: float) -> torch.Tensor:
    """One query at a time, over the keys that it may see."""
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = allowed[b, 0, t].nonzero()[:, 0]
                weights = (k[b, h // (HEADS // SHARED), seen] @ q[b, h, t] * scaling).softmax(0)
                out[b, t, h] = weights @ v[b, h // (HEADS // SHARED), seen]
    return out


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_against_a_loop_over_queries(rows: int, scaling: float | None) -> None:
    q, k, v = qkv(rows, 5)
    allowed = torch.ones(2, 1, rows, 5, dtype=torch.bool).tril(5 - rows)
    allowed[1, :, -1, 1:3] = False
    output, _ = grouped_query_attention(MODULE, q, k, v, additive(allowed), scaling=scaling)
    torch.testing.assert_close(output, naive(q, k, v, allowed, scaling or WIDTH**-0.5), rtol=0, atol=1e-12)


def test_without_padding_values_and_gradients_are_those_of_the_rows() -> None:
    """Lengths 5, 2 and 3 in rows of 5: what stands in the padding reaches nobody, and gets no gradient."""
    lengths = [5, 2, 3]
    real = torch.tensor([[column < n for column in range(5)] for n in lengths])
    allowed = torch.ones(5, 5, dtype=torch.bool).tril() & (real[:, None, :] | torch.eye(5, dtype=torch.bool))
    mask = additive(allowed[:, None])
    place = real.flatten().nonzero()[:, 0]
    padding_map = PaddingMap((real.flatten().cumsum(0) - 1).clamp(min=0), place)
    padded = [tensor.requires_grad_() for tensor in qkv(5, 5, batch=3)]
    of_tokens = [t.detach().transpose(1, 2).flatten(0, 1)[place][None].transpose(1, 2).requires_grad_() for t in padded]
    weight = torch.randn(1, len(place), HEADS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    expected = grouped_query_attention(MODULE, *padded, mask)[0].flatten(0, 1)[place][None]
    output, _ = grouped_query_attention(MODULE, *of_tokens, mask, padding_map=padding_map)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    (expected * weight).sum().backward()
    (output * weight).sum().backward()
    for tokens, rows in zip(of_tokens, padded, strict=True):
        gradient = rows.grad.transpose(1, 2).flatten(0, 1)
        assert not gradient[~real.flatten()].any()
        torch.testing.assert_close(tokens.grad.transpose(1, 2)[0], gradient[place], rtol=0, atol=1e-12)


def test_a_row_that_sees_nothing_under_a_mask_of_another_precision() -> None:
    """fp32's lowest number is -inf in bf16: padding on the left, under autocast, must not become NaN."""
    q, k, v = (tensor.bfloat16() for tensor in qkv(3, 3))
    mask = additive(torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()).float().clamp(min=torch.finfo(torch.float32).min)
    mask[0, :, 0] = torch.finfo(torch.float32).min
    output, _ = grouped_query_attention(MODULE, q, k, v, mask)
    assert output.dtype == torch.bfloat16 and bool(output.isfinite().all())
    torch.testing.assert_close(output[0, 0], v[0].mean(1).repeat_interleave(HEADS // SHARED, 0), rtol=0, atol=0.02)


@pytest.mark.parametrize("what", ["no mask", "bool mask", "a mask for each head"])
def test_what_it_leaves_to_sdpa(what: str) -> None:
    q, k, v = qkv(5, 5)
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask = {"no mask": None, "bool mask": allowed}.get(what, additive(allowed).expand(-1, HEADS, -1, -1))
    assert torch.equal(
        grouped_query_attention(MODULE, q, k, v, mask)[0], sdpa_attention_forward(MODULE, q, k, v, mask)[0]
    )


def test_which_models_take_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped one on a CPU; not one with soft-capped scores, and not one whose attention cannot be replaced."""
    assert tiny.config._attn_implementation == GROUPED_QUERY
    small = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    capped = Gemma2Config(**small, intermediate_size=8, num_key_value_heads=1, head_dim=8)
    bloom = BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=1)
    expected = [(LlamaConfig(**small, intermediate_size=8), True), (capped, False), (bloom, False)]
    for config, takes in expected:
        assert attention.supports_grouped_query(AutoModelForCausalLM.from_config(config)) == takes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_attention(ModelSection(name="tiny")) == "sdpa"
