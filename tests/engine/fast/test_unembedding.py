"""The unembedding of a large vocabulary in parts: what linear layers compute, where nothing else is asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import SMALL, adapter, random_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit.engine.fast import speedups
from toolkit.engine.fast.unembedding import PART, WIDE
from toolkit.engine.logps import state_logps

IDS = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
VOCABULARY = WIDE + PART // 2 + 1  # no whole number of parts


def large(**more: Any) -> Any:
    return random_model(LlamaConfig(**(SMALL | {"vocab_size": VOCABULARY} | more)), AutoModelForCausalLM.from_config)


def products(call: Any) -> list[list[int]]:
    """The shapes of the second factors of the products that a call computes."""
    with torch.profiler.profile(record_shapes=True) as seen:
        call()
    return [event.input_shapes[1] for event in seen.events() if event.name == "aten::mm"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(9, 32), (2, 5, 32), (1, 32), (32,), (2, 0, 32)])
def test_values_and_gradients_are_those_of_a_linear_layer(bias: bool, shape: tuple[int, ...]) -> None:
    model = large()
    plain = nn.Linear(32, VOCABULARY, bias=bias).requires_grad_(False)
    model.lm_head = copy.deepcopy(plain)
    head = speedups.install(model).lm_head
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    gradient = torch.randn((*shape[:-1], VOCABULARY), generator=torch.Generator().manual_seed(2))
    values = [layer(x) for layer, x in zip((head, plain), xs, strict=True)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)
    for value in values:
        value.backward(gradient)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-4)
    if xs[0].numel():
        assert max(size for _, size in products(lambda: head(xs[0].detach()))) == PART


@pytest.mark.parametrize("shape", [(9, 32), (2, 5, 32)])
def test_logits_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    model = large()
    plain = model.lm_head.requires_grad_(False)
    gradients = []
    for head in (copy.deepcopy(plain), speedups.install(model).lm_head):
        x = torch.ones(shape).requires_grad_()
        logits = head(x)
        logits /= 0.7
        logits[..., 3] = 0.0
        logits.logsumexp(-1).sum().backward()
        frozen, learned = head(x.detach()), torch.ones(VOCABULARY, requires_grad=True)
        frozen += learned
        frozen.square().sum().backward()
        gradients.append((x.grad, learned.grad))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_second_derivatives_transforms_and_traces_are_those_of_a_linear_layer(tmp_path: Path) -> None:
    model = large()
    plain = copy.deepcopy(model.lm_head.requires_grad_(False))
    head = speedups.install(model).lm_head
    x = torch.randn((3, 32), generator=torch.Generator().manual_seed(1))

    def loss(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return layer(states).logsumexp(-1).sum()

    def second(layer: nn.Module) -> torch.Tensor:
        [first] = torch.autograd.grad(loss(layer, states := x.clone().requires_grad_()), states, create_graph=True)
        return torch.autograd.grad(first.square().sum(), states)[0]

    def traced(layer: nn.Module) -> torch.Tensor:
        torch.jit.trace(layer, x).save(tmp_path / "head.pt")
        return torch.jit.load(tmp_path / "head.pt")(x)

    def each_row(layer: nn.Module) -> torch.Tensor:
        return torch.vmap(torch.func.grad(lambda row: loss(layer, row)))(x)

    for compute in (second, traced, each_row):
        torch.testing.assert_close(compute(head), compute(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_gives_what_it_gave(tied: bool) -> None:
    model = large(tie_word_embeddings=tied)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        torch.testing.assert_close(speedups.install(model)(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)


def test_log_probabilities_with_an_adapter_have_the_gradients_of_the_whole_product() -> None:
    gradients = []
    for change in (speedups.install, lambda model: model):
        model = change(adapter(large()))
        states = model.get_base_model().model(IDS).last_hidden_state.flatten(0, 1)
        logps, _ = state_logps(model, states, torch.arange(len(states)))
        logps.sum().backward()
        gradients.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-4)


def test_what_stays_a_linear_layer() -> None:
    """A head that trains, other precisions, autocast, small vocabularies and heads of another kind."""
    head = speedups.install(large()).lm_head
    x = torch.randn(4, 32)
    head(x).sum().backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        assert [
            *(size for _, size in products(lambda: head.bfloat16()(x.bfloat16()))),
            *(size for _, size in products(lambda: head.double()(x.double()))),
        ] == [VOCABULARY] * 2
        with torch.autocast("cpu", torch.bfloat16):
            assert head.float()(x).dtype == torch.bfloat16
    assert type(speedups.install(random_model(LlamaConfig(**SMALL))).lm_head) is nn.Linear

    class Doubled(nn.Linear):
        pass

    model = large()
    model.lm_head.__class__ = Doubled
    assert type(speedups.install(model).lm_head) is Doubled
