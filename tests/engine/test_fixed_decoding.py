"""Decoding with tensors of fixed shape gives the tokens of decoding without, or leaves a model as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.small_models import SMALL, adapter, llama, random_model
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from toolkit.engine import decoding, fixed_decoding
from toolkit.engine.fast import fixed_cache
from toolkit.engine.sampling import SampledResponse, SamplingParams, generate

pytestmark = pytest.mark.invariant

# Ragged; one that is a single token, and one that comes twice among others.
PROMPTS = [[5], [9, 30, 41], [17, 13, 20, 8, 9, 10, 11], [40, 41, 42], [9, 30, 41], [17, 5, 6, 8, 19, 3, 3, 4, 50]]
N_SAMPLES, LENGTH = 3, 20
FREE = SamplingParams(LENGTH, n=N_SAMPLES, batch_size=7, fixed_shapes=False)
FIXED = replace(FREE, fixed_shapes=True)


@pytest.fixture(autouse=True)
def forget_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_decoding, "REFUSED", set())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each step with fixed shapes."""
    counted: list[int] = []
    step = fixed_decoding._FixedBatch.compute_step

    def counting(self: Any) -> None:
        counted.append(len(self.ids))
        step(self)

    monkeypatch.setattr(fixed_decoding._FixedBatch, "compute_step", counting)
    return counted


def sample(
    model: Any, params: SamplingParams, stop: Any = (2,), prompts: Any = PROMPTS, dtype: torch.dtype = torch.float32
) -> list[SampledResponse]:
    keys = [(4, i, k) for i in range(len(prompts)) for k in range(N_SAMPLES)]
    each = [ids for ids in prompts for _ in range(N_SAMPLES)]
    return generate(model, each, keys, params, stop_token_ids=stop, pad_id=0, dtype=dtype)


def ends_of(model: Any) -> list[int]:
    """Stop tokens at which some responses end early, and others do not."""
    return sorted(
        {response.ids[k] for response in sample(model, FREE, (63,)) for k in (2, 9) if len(response.ids) > k}
    )[:6]


SHAPE = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, eager": lambda: random_model(LlamaConfig(**SMALL), attn_implementation="eager"),
    "qwen2": lambda: random_model(Qwen2Config(**SMALL)),
    "qwen3": lambda: random_model(Qwen3Config(**SMALL, head_dim=16)),
    "mistral, wide window": lambda: random_model(MistralConfig(**SMALL, sliding_window=64)),
    "gemma2": lambda: random_model(Gemma2Config(**SMALL, head_dim=16, sliding_window=64)),
    "gpt2": lambda: random_model(
        GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    ),
    "opt": lambda: random_model(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=64,
            init_std=0.3,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            dropout=0.0,
        )
    ),
    "gpt_neox": lambda: random_model(GPTNeoXConfig(**SHAPE, hidden_size=32, intermediate_size=64)),
    "llama with an adapter": lambda: adapter(llama()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_tokens_of_decoding_without_fixed_shapes(kind: str, steps: list[int]) -> None:
    model = MODELS[kind]()
    stop = ends_of(model)
    expected = sample(model, FREE, stop)
    assert len({len(response.ids) for response in expected}) > 3 and not steps
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fixed = sample(model, FIXED, stop)
    assert fixed == expected
    assert [a.logp for a in fixed] == pytest.approx([a.logp for a in expected], abs=1e-4)
    assert set(steps) == {7}, "the last batch has fewer rows, and takes the place of the one before"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_temperatures(temperature: float, steps: list[int]) -> None:
    model = llama()
    expected = sample(model, replace(FREE, temperature=temperature))
    assert sample(model, replace(FIXED, temperature=temperature)) == expected and steps


def test_a_batch_whose_rows_have_all_ended_is_done(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host looks after so many tokens; what a row drew after its end is cut off."""
    model = llama()
    one = replace(FIXED, batch_size=64)
    everything = range(64)
    assert {len(response.ids) for response in sample(model, one, everything)} == {1}
    assert len(steps) == 1
    monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", 6)
    assert {len(response.ids) for response in sample(model, one, everything)} == {1}
    assert len(steps) == 1 + 6


def test_batches_of_another_length_get_another_room(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = fixed_cache.fixed_cache

    def counting(like: Any, n_rows: int, length: int, place: torch.Tensor) -> Any:
        made.append(length)
        return whole(like, n_rows, length, place)

    monkeypatch.setattr(fixed_cache, "fixed_cache", counting)
    prompts = [[5] * 60, [7] * 50, [9] * 30, [11] * 20]
    model = llama()
    params = replace(FIXED, batch_size=N_SAMPLES)
    assert sample(model, params, prompts=prompts) == sample(model, FREE, prompts=prompts)
    assert made == [128, 64]


# ---------------------------------------------------------------- models and batches that stay as they are


class Bent(LlamaForCausalLM):
    """Sees another mask than it is given, where that has four dimensions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        whole = self.model.forward

        def forward(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            if attention_mask is not None and attention_mask.dim() == 4:
                attention_mask = self.bent(attention_mask)
            return whole(*args, attention_mask=attention_mask, **kwargs)

        self.model.forward = forward  # type: ignore[method-assign]

    def bent(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(mask)


class Refusing(Bent):
    def bent(self, mask: torch.Tensor) -> torch.Tensor:
        raise ValueError("two dimensions")


@pytest.mark.parametrize(("kind", "why"), [(Bent, "distributions are off by"), (Refusing, "two dimensions")])
def test_a_model_that_computes_something_else_is_left_out(
    kind: Any, why: str, steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(LlamaConfig(**SMALL), kind)
    expected = sample(model, FREE)
    assert sample(model, FIXED) == expected == sample(model, FIXED)
    assert not steps
    assert caplog.text.count("is sampled without a CUDA graph") == 1 and why in caplog.text


def test_weights_in_float32_under_products_in_bfloat16(steps: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """As in full fine-tuning. Rounding moves a draw now and then, and what follows it."""
    model = llama()
    free, fixed = (sample(model, params, dtype=torch.bfloat16) for params in (FREE, FIXED))
    assert steps and not caplog.text
    assert sum(a.ids[:2] == b.ids[:2] for a, b in zip(free, fixed, strict=True)) >= 0.8 * len(free)


def test_a_kind_that_is_refused_leaves_others_alone(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    fixed_decoding.REFUSED.add((type(model), torch.float32, torch.float32))
    assert sample(model, FIXED) == sample(model, FREE) and not steps
    sample(model.bfloat16(), FIXED, dtype=torch.bfloat16)
    assert steps


def test_a_batch_without_room_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fixed_decoding._FixedBatch, "difference", full)
    model = llama()
    assert sample(model, FIXED) == sample(model, FREE)
    assert "no room" in caplog.text and not fixed_decoding.REFUSED


@pytest.mark.parametrize("right", [True, False])
def test_a_graph_must_draw_what_its_step_draws(
    right: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU's graph, by a stand-in: one that reads and writes elsewhere does nothing for the batch."""

    def captured(step: Callable[[], None]) -> Callable[[], None]:
        for _ in range(2):
            step()
        return step if right else lambda: None

    monkeypatch.setattr(fixed_decoding, "GRAPHS", {"cpu"})
    monkeypatch.setattr(fixed_cache, "captured", captured)
    model = llama()
    assert sample(model, FIXED) == sample(model, FREE)
    assert ("a graph draws" in caplog.text) is not right


OTHERS: dict[str, Callable[[], Any]] = {
    "its state runs through the row": lambda: random_model(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    ),
    "a window that bites": lambda: random_model(MistralConfig(**SMALL, sliding_window=8)),
    "positions from the mask": lambda: random_model(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3)
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_needs_more_than_keys_and_values_is_decoded_as_before(
    kind: str, steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = OTHERS[kind]()
    assert sample(model, FIXED) == sample(model, FREE)
    assert not steps and not caplog.text


def test_short_responses_are_not_worth_a_graph(steps: list[int]) -> None:
    model = llama()
    short = replace(FIXED, max_new_tokens=fixed_decoding.LEAST_TOKENS - 1)
    assert sample(model, short) == sample(model, replace(short, fixed_shapes=False))
    assert not steps
