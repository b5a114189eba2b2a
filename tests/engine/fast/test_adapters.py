"""Adapters: what they compute is what peft computes, and merging restores every bit."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from support.small_models import adapter

from toolkit.engine.fast import adapters, speedups

IDS = torch.randint(5, 250, (16, 12), generator=torch.Generator().manual_seed(0))
Make = Callable[[], Any]


# ---------------------------------------------------------------- fused layers


def logits_and_gradients(model: Any, *, autocast: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    return logits.detach().float(), {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_a_fused_layer_computes_what_pefts_does(new_tiny: Make, more: dict[str, Any]) -> None:
    """Against fp32: no further off than peft's own bf16, logits and gradients alike."""
    exact, gradients = logits_and_gradients(adapter(new_tiny(), **more), autocast=False)
    errors = []
    for change in (speedups.install, lambda model: model):
        rounded, of_rounded = logits_and_gradients(change(adapter(new_tiny().bfloat16(), **more)))
        assert of_rounded.keys() == gradients.keys()
        off = sum(float((of_rounded[n] - g).square().sum()) for n, g in gradients.items())
        size = sum(float(g.square().sum()) for g in gradients.values())
        errors.append((float((rounded - exact).norm() / exact.norm()), (off / size) ** 0.5))
    (fused, fused_gradient), (of_peft, peft_gradient) = errors
    assert fused <= 1.2 * of_peft and fused_gradient <= 1.2 * peft_gradient


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_in_fp32_a_fused_layer_differs_from_pefts_by_rounding(new_tiny: Make, more: dict[str, Any]) -> None:
    model = adapter(new_tiny(), **more)
    expected, gradients = logits_and_gradients(model, autocast=False)
    fused, of_fused = logits_and_gradients(speedups.install(model), autocast=False)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
    assert of_fused.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_fused[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_layer_makes_no_copies(new_tiny: Make, dtype: torch.dtype) -> None:
    """No activation becomes fp32 where it is not, and the product of the low rank is added in place."""
    model = speedups.install(adapter(new_tiny().to(dtype)))
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    x = torch.randn(1, 7, layer.in_features, dtype=dtype)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast, torch.profiler.profile() as seen, torch.no_grad():
        layer(x)
    names = [event.name for event in seen.events()]
    assert "aten::addmm_" in names and "aten::add" not in names and "aten::mul" not in names


def test_a_low_rank_product_and_its_gradients() -> None:
    """By hand in fp64 from the rounded tensors; each gradient is rounded once or twice, to bf16's 2^-9."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 7, 20), "weight": (12, 20), "bias": (12,), "a": (4, 20), "b": (12, 4), "gradient": (2, 7, 12)}
    rounded = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in shapes.items()}
    exact = {n: value.double().requires_grad_() for n, value in rounded.items()}
    expected = exact["x"] @ (exact["weight"] + 0.7 * exact["b"] @ exact["a"]).t() + exact["bias"]
    expected.backward(exact["gradient"])
    x, a, b = rounded["x"].clone().requires_grad_(), *(rounded[n].float().requires_grad_() for n in "ab")
    product = adapters._LoraProduct.apply(x, rounded["weight"], rounded["bias"], a, b, 0.7, torch.bfloat16)
    product.backward(rounded["gradient"])
    pairs = [(product, expected), *((tensor.grad, exact[n].grad) for n, tensor in (("x", x), ("a", a), ("b", b)))]
    for value, reference in pairs:
        assert float((value.detach().double() - reference.detach()).norm() / reference.detach().norm()) < 2**-8


def single_layers(dtype: torch.dtype = torch.float32) -> tuple[LoraLinear, LoraLinear]:
    """peft's layer with a bias, and the same one fused."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(20, 12)).to(dtype)
    config = LoraConfig(target_modules=["0"], r=4, lora_alpha=6, init_lora_weights=False)
    layers = get_peft_model(base, config, autocast_adapter_dtype=False)
    plain, fused = copy.deepcopy(layers), layers
    adapters.fuse_lora_layers(fused)
    return plain.base_model.model[0], fused.base_model.model[0]


@pytest.mark.parametrize("shape", [(20,), (3, 20), (0, 20), (2, 0, 20), (2, 3, 20), (2, 3, 4, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_of_any_shape_that_the_model_changes_in_place(
    shape: tuple[int, ...], dtype: torch.dtype, autocast: bool
) -> None:
    """As OLMo clamps queries, keys and values."""
    found = []
    for layer in single_layers(dtype):
        x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        out.clamp_(-1.0, 1.0).square().sum().backward()
        gradients = (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
        found.append((out.detach(), x.grad, *gradients))
    rounds = autocast and dtype == torch.float32  # autocast leaves fp64 as it is
    tolerance = 0.05 if rounds else 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_a_hook_on_any_part_of_a_layer_is_called(part: str, register: str) -> None:
    _, layer = single_layers()
    module = getattr(layer, part)
    calls: list[Any] = []
    getattr(module if part == "base_layer" else module["default"], f"register_{register}")(
        lambda *args: calls.append(args)
    )
    layer(torch.ones(2, 20, requires_grad=True)).sum().backward()
    assert len(calls) == 1


def test_without_values_and_under_transforms(tmp_path: Path) -> None:
    plain, fused = single_layers()
    x = torch.randn((3, 20), generator=torch.Generator().manual_seed(1))
    torch.jit.trace(fused, x).save(tmp_path / "layer.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "layer.pt")(x), plain(x))
    each_row = [torch.vmap(torch.func.grad(lambda row, f=f: f(row).square().sum()))(x) for f in (plain, fused)]
    torch.testing.assert_close(each_row[1], each_row[0])
    assert fused.to("meta")(x.to("meta")).shape == (3, 12)


class DoubledLinear(torch.nn.Linear):
    """Computes something else with its weight, as quantised layers do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_what_a_fused_layer_leaves_to_peft(new_tiny: Make) -> None:
    """Dropout, a base that trains, one that is another kind of linear layer, and one with a hook."""
    model = speedups.install(adapter(new_tiny(), lora_dropout=0.5)).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    model = speedups.install(adapter(new_tiny()))
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    layer.base_layer.weight.requires_grad_(True)
    _, gradients = logits_and_gradients(model)
    assert any("base_layer" in name for name in gradients)
    layer.base_layer.requires_grad_(False)
    x = torch.randn(1, 7, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        adapted, base = layer(x), layer.base_layer(x)
        layer.base_layer.__class__ = DoubledLinear
        torch.testing.assert_close(layer(x), adapted + base, rtol=0.02, atol=0.05)
        layer.base_layer.__class__ = torch.nn.Linear
        layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
        torch.testing.assert_close(layer(x), adapted + base, rtol=0.02, atol=0.05)


def test_outside_autocast_an_adapter_computes_as_peft_does(new_tiny: Make) -> None:
    """In bf16 with fp32 adapters, as users call a trained policy; with another adapter, and with none."""
    model, fused = adapter(new_tiny().bfloat16()), speedups.install(adapter(new_tiny().bfloat16()))
    with torch.no_grad():
        assert torch.equal(fused(input_ids=IDS).logits, model(input_ids=IDS).logits)
        with model.disable_adapter(), fused.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(input_ids=IDS).logits, model(input_ids=IDS).logits)
        for each in (model, fused):
            each.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
            each.base_model.set_adapter(["default", "other"])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_with_fused_layers_uses_its_own_weights(new_tiny: Make, copied: Callable[[Any], Any]) -> None:
    model = speedups.install(adapter(new_tiny().bfloat16()))
    twin = copied(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=IDS).logits
        for name, weight in twin.named_parameters():
            if "lora_B" in name:
                weight.zero_()
        assert torch.equal(model(input_ids=IDS).logits, before)
        assert not torch.equal(twin(input_ids=IDS).logits, before)


def test_a_model_with_fused_layers_is_gone_when_nothing_names_it(new_tiny: Make) -> None:
    """At once, not when the garbage is collected: one model in memory at a time."""
    model = speedups.install(adapter(new_tiny()))
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(next(m for m in model.modules() if isinstance(m, LoraLinear)).base_layer.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ],
    ids=["lora", "rslora", "two layers", "dora", "embeddings", "tied unembedding", "modules_to_save", "lora_bias"],
)
def test_a_merged_model_computes_what_the_adapter_does(new_tiny: Make, more: dict[str, Any]) -> None:
    model = adapter(new_tiny(), **more)
    ids = torch.tensor([[5, 9, 30, 77, 100]])
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
        with adapters.merged_adapters(model):
            merged = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert float((unmerged - bare).abs().max()) > 0.5
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=2e-3)
    assert torch.equal(after, unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_restores_every_bit(new_tiny: Make, dtype: torch.dtype) -> None:
    model = adapter(new_tiny().to(dtype))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(3):
        with adapters.merged_adapters(model):
            pass
    with pytest.raises(RuntimeError, match="stop"), adapters.merged_adapters(model):
        raise RuntimeError("stop")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    ids = torch.tensor([[5, 9, 30]])
    with model.disable_adapter():
        off = model(input_ids=ids).logits
    assert not torch.equal(model(input_ids=ids).logits, off)  # the adapter is on again


# ---------------------------------------------------------------- merging into bf16


def trained_a_little(model: Any, size: float) -> Any:
    """A model on weights in bf16 with an adapter after one step of Adam at this learning rate."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(-size * weight.grad.sign())
    return wrapped.eval()


def to_nearest(exact: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    return exact.to(dtype)


@pytest.mark.parametrize("size", [3e-5, 1e-4])
def test_merging_into_bf16_keeps_small_updates(new_tiny: Make, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products here are exact (fp32), and the weights on the grid of bf16: what differs is their rounding alone."""
    model = trained_a_little(new_tiny().bfloat16().float(), size)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    base = {name: layer.base_layer.weight.clone() for name, layer in layers.items()}
    updates = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}

    def kept_and_off() -> tuple[float, float, torch.Tensor]:
        """The share of the updates along themselves, and the KL from the policy in training, in nats per token."""
        with torch.no_grad(), adapters.merged_adapters(model, torch.bfloat16):
            sampling = model(input_ids=IDS).logits.log_softmax(-1)
            moved = {name: layer.base_layer.weight - base[name] for name, layer in layers.items()}
            assert all(torch.equal(w.bfloat16().float(), w) for w in (base[n] + moved[n] for n in layers))
        along = sum(float((moved[name] * update).sum()) for name, update in updates.items())
        kl = float((trained.exp() * (trained - sampling)).sum(-1).mean())
        return along / sum(float(update.square().sum()) for update in updates.values()), kl, sampling

    with torch.no_grad():
        trained = model(input_ids=IDS).logits.log_softmax(-1)
    kept, off, sampling = kept_and_off()
    assert kept == pytest.approx(1, abs=0.03)
    assert torch.equal(kept_and_off()[2], sampling)  # a rerun samples from the same policy
    monkeypatch.setattr(adapters, "stochastically_rounded", to_nearest)
    kept_by_nearest, off_by_nearest, _ = kept_and_off()
    assert kept_by_nearest < 0.6 and off < off_by_nearest / 3


def test_the_sampler_in_bf16_has_the_log_probabilities_that_training_reached(
    new_tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By how much a step of training raised those of its tokens: in the unmerged model, and where it samples."""
    exact = trained_a_little(new_tiny().bfloat16().float(), 1e-4)
    model = copy.deepcopy(exact)
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.bfloat16()

    def mean_logp(of: Any) -> float:
        with torch.no_grad():
            logps = of(input_ids=IDS).logits[:, :-1].float().log_softmax(-1)
        return float(logps.gather(-1, IDS[:, 1:, None]).mean())

    def of_sampler() -> float:
        with speedups.decoding(model.get_base_model(), torch.bfloat16):
            return mean_logp(model.get_base_model())

    with exact.disable_adapter(), model.disable_adapter():
        before, sampler_before = mean_logp(exact), of_sampler()
    reached = mean_logp(exact) - before
    assert of_sampler() - sampler_before == pytest.approx(reached, rel=0.2)
    monkeypatch.setattr(adapters, "stochastically_rounded", to_nearest)
    assert of_sampler() - sampler_before < 0.3 * reached


def test_an_adapter_that_is_off_is_not_merged(new_tiny: Make) -> None:
    model = adapter(new_tiny())
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=ids).logits
        with adapters.merged_adapters(model):
            assert torch.equal(model(input_ids=ids).logits, off)
            assert torch.equal(model.get_base_model()(input_ids=ids).logits, off)
        assert torch.equal(model(input_ids=ids).logits, off)


def test_the_active_adapter_alone_is_merged(new_tiny: Make) -> None:
    model = adapter(new_tiny())
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.tensor([[5, 9, 30]])
    results = []
    for name in ("default", "other"):
        model.set_adapter(name)
        with torch.no_grad():
            unmerged = model(input_ids=ids).logits
            with adapters.merged_adapters(model):
                torch.testing.assert_close(model(input_ids=ids).logits, unmerged, rtol=0, atol=2e-3)
        results.append(unmerged)
    assert not torch.allclose(*results)
