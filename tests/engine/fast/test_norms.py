"""Lean norms: bit for bit what the model computes, its gradient within rounding, and other norms left alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from toolkit.engine.fast import norms

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))


def n_lean(model: Any) -> int:
    return sum(isinstance(module, norms._LeanRMSNorm) for module in model.modules())


def made(cls: Any, config: Any) -> Any:
    """A frozen model whose norms have weights of all kinds."""
    torch.manual_seed(0)
    model = cls(config(**SMALL)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(torch.randn(weight.shape))
    return model


def norm(dtype: torch.dtype, width: int = 24) -> LlamaRMSNorm:
    module = LlamaRMSNorm(width, eps=0.1)  # large, so that leaving it out would show
    module.weight.data = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(dtype)
    return module.requires_grad_(False)


def through(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    [gradient] = torch.autograd.grad((out.double() * torch.linspace(-1, 2, out.numel()).view_as(out)).sum(), x)
    return out.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_a_lean_norm_is_the_models_own(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x = (torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    before = x.clone()
    own, own_gradient = through(norm(weight_dtype), x)
    found, gradient = through(norms.lean(norm(weight_dtype)), x)
    assert torch.equal(x, before)
    assert found.dtype == own.dtype and torch.equal(found, own)
    close = 2e-6 if dtype == torch.float32 else 2**-8
    assert (gradient - own_gradient).abs().max() <= close * own_gradient.abs().max()
    with torch.no_grad():
        assert torch.equal(norms.lean(norm(weight_dtype))(x), own)
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass too, where a product would be rounded
        assert all(map(torch.equal, through(norms.lean(norm(weight_dtype)), x), (found, gradient)))


def test_the_gradient_is_that_of_finite_differences() -> None:
    module = norm(torch.float32, width=6)
    x = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        return module.weight.double() * x / (x.square().mean() + 0.1).sqrt()

    slopes = torch.linspace(-1, 2, 6, dtype=torch.float64)
    steps = torch.eye(6, dtype=torch.float64) * 1e-6
    expected = torch.stack([((by_hand(x + s) - by_hand(x - s)) * slopes).sum() / 2e-6 for s in steps])
    _, gradient = through(norms.lean(module), x.float())
    torch.testing.assert_close(gradient.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("cls", "config", "lean"),
    [
        (LlamaForCausalLM, LlamaConfig, 5),
        (Qwen3ForCausalLM, Qwen3Config, 9),  # norms of the heads too
        (Gemma2ForCausalLM, Gemma2Config, 0),  # 1 + w
        (Olmo2ForCausalLM, Olmo2Config, 0),  # rounds behind the weight
    ],
)
def test_norms_of_another_kind_stay(cls: Any, config: Any, lean: int) -> None:
    own = made(cls, config).bfloat16()
    model = norms.lean(made(cls, config).bfloat16())
    assert n_lean(model) == lean
    assert torch.equal(model(input_ids=IDS).logits, own(input_ids=IDS).logits)


def test_weights_that_train_get_their_gradient(new_tiny: Callable[[], Any]) -> None:
    model = new_tiny().requires_grad_(True)
    assert n_lean(model) > 0
    model(input_ids=IDS).logits.sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "norm" in name)


def test_a_model_with_lean_norms_is_copied_and_pickled(new_tiny: Callable[[], Any]) -> None:
    model = new_tiny()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert n_lean(twin) == n_lean(model) > 0
            assert torch.equal(twin(input_ids=IDS).logits, expected)
            next(m for m in twin.modules() if isinstance(m, norms._LeanRMSNorm)).weight.data.mul_(2)  # type: ignore[operator]
            assert not torch.equal(twin(input_ids=IDS).logits, expected)
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_norm_that_does_not_run_here_stays() -> None:
    class KernelRMSNorm(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a kernel for another device")

    assert type(norms.lean(KernelRMSNorm(24))) is KernelRMSNorm
    assert type(norms.lean(LlamaRMSNorm(24).to("meta"))) is LlamaRMSNorm


def test_a_forward_that_somebody_replaced_stays() -> None:
    module = norm(torch.float32)
    module.forward = lambda x: x + 1
    assert torch.equal(norms.lean(module)(torch.zeros(24)), torch.ones(24))
