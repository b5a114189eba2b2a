"""Sampling: the same for any batch, from the exact distribution, ending where it should; adapters merged and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.small_models import adapter
from transformers import AutoModelForCausalLM, MambaConfig

from toolkit.engine import decoding
from toolkit.engine.decoding import draw
from toolkit.engine.sampling import SampledResponse, SamplingParams, generate, sample_responses, uniforms
from toolkit.models.load import load_policy
from toolkit.models.tokenizer import eos_ids, load_tokenizer, response_end
from toolkit.recipe.training import ModelSection

PROMPTS = [[5], [9, 30, 41], [77, 13, 200, 8, 9, 10, 11], [40, 41, 42], [300, 301], [17, 5, 6, 8, 1999]]
KEYS = [(0, "test", i) for i in range(len(PROMPTS))]
Make = Callable[[], Any]


def sample(model: Any, prompts: list[list[int]] = PROMPTS, keys: Any = KEYS, **more: Any) -> list[SampledResponse]:
    stop = more.pop("eos_ids", [2])
    settings = {"stop_token_ids": stop, "pad_id": 0, "dtype": torch.float32}
    settings |= {name: more.pop(name) for name in ("dtype", "advance") if name in more}
    return generate(model, prompts, keys, SamplingParams(**({"max_new_tokens": 12} | more)), **settings)


def test_n_responses_of_each_prompt_by_its_key(tiny: Any, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.9, n=2, batch_size=3)
    groups = sample_responses(tiny, tokenizer, PROMPTS, lambda i, k: ("test", i, k), params, dtype=torch.float32)
    twice, keys = [ids for ids in PROMPTS for _ in range(2)], [("test", i, k) for i in range(6) for k in range(2)]
    expected = sample(tiny, twice, keys, temperature=0.9, eos_ids=eos_ids(tiny, tokenizer))
    assert groups == [expected[2 * i : 2 * i + 2] for i in range(6)]
    stopped = sample_responses(
        tiny,
        tokenizer,
        PROMPTS[:1],
        lambda i, k: ("test", i, k),
        SamplingParams(12, temperature=0.9, stop_token_ids=[groups[0][0].ids[2]]),
        dtype=torch.float32,
    )
    assert [response.ids for [response] in stopped] == [groups[0][0].ids[:3]]
    assert sample_responses(tiny, tokenizer, [], lambda i, k: (), params, dtype=torch.float32) == []


# ---------------------------------------------------------------- streams of uniform numbers


def test_uniforms_are_functions_of_their_key() -> None:
    keys = [(1, "rollout", 2, "ab"), (1, "rollout", 2, "ba"), (1, "rollout", 22, "b"), (12, "rollout", 2, "b")]
    rows = uniforms(keys, 64)
    assert rows.dtype == np.float32 and rows.min() >= 0 and rows.max() < 1
    assert len({row.tobytes() for row in rows}) == 4
    assert np.array_equal(uniforms([keys[2]], 64)[0], rows[2])
    assert np.array_equal(uniforms(keys, 10), rows[:, :10])


def test_uniforms_are_uniform() -> None:
    drawn = uniforms([(seed,) for seed in range(200)], 50)
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    # Streams of neighbouring keys have nothing to do with each other.
    correlation = np.corrcoef(drawn)[np.triu_indices(200, 1)]
    assert abs(correlation.mean()) < 0.005


# ---------------------------------------------------------------- the draw


def drawn(scores: torch.Tensor, u: float) -> int:
    return int(draw(scores[None], torch.tensor([u], dtype=torch.float32), 1.0)[0])


def test_the_draw_by_hand() -> None:
    scores = torch.tensor([0.5, 0.0, 0.25, 0.25]).log()
    tokens = [drawn(scores, u) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.99999994)]
    assert tokens == [0, 0, 2, 2, 3, 3]  # the second token has no probability


def test_each_row_has_a_number_of_its_own() -> None:
    assert draw(torch.zeros(3, 10), torch.tensor([0.15, 0.95, 0.65]), 1.0)[0].tolist() == [1, 9, 6]


def test_a_draw_next_to_one_stays_inside_the_support() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5000, generator=generator)
    scores[100:] = -torch.inf
    scores[0] = -torch.inf
    top = float(np.nextafter(np.float32(1), np.float32(0)))
    assert drawn(scores, top) < 100
    assert drawn(scores, 0.0) == 1


def test_every_token_is_drawn_as_often_as_it_is_likely() -> None:
    scores = torch.tensor([1.0, -1.0, 0.3, 2.0, -3.0])
    u = torch.from_numpy(uniforms([(seed,) for seed in range(20_000)], 1))
    for temperature in (1.0, 0.5, 2.0):
        chosen, _ = draw(scores.expand(len(u), -1), u[:, 0], temperature)
        counts = torch.bincount(chosen, minlength=5).numpy()
        expected = (scores.double() / temperature).softmax(0).numpy() * len(u)
        assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_model_is_sampled_and_nothing_else(tiny: Any, temperature: float) -> None:
    """First tokens of 3000 samples against the model's exact probabilities (chi-square over the likely tokens)."""
    n = 3000
    # The prompt with the least certain continuation says the most.
    with torch.no_grad():
        logits_P = [tiny(input_ids=torch.tensor([ids])).logits[0, -1].double() for ids in PROMPTS]
    entropies = [float(torch.distributions.Categorical(logits=logits).entropy()) for logits in logits_P]
    best = max(range(len(PROMPTS)), key=entropies.__getitem__)
    prompt, logits = PROMPTS[best], logits_P[best]
    samples = sample(
        tiny, [prompt] * n, [(7, i) for i in range(n)], max_new_tokens=1, temperature=temperature, batch_size=500
    )
    p = (logits / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([s.ids[0] for s in samples]), minlength=p.numel())
    likely = p * n >= 5
    observed = [*counts[likely].tolist(), int(counts[~likely].sum())]
    expected = [*(p[likely] * n).tolist(), float(p[~likely].sum() * n)]
    assert len(observed) > 5
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 1),
        ("top_p", 0.01),
        ("temperature", 0.01),
        ("max_length", 4),
        ("repetition_penalty", 3.0),
        ("no_repeat_ngram_size", 1),
        ("min_new_tokens", 12),
        ("suppress_tokens", list(range(3, 1500))),
        ("forced_eos_token_id", 7),
        ("num_return_sequences", 2),
    ],
)
def test_the_models_own_generation_settings_do_not_count(new_tiny: Make, tiny: Any, name: str, value: object) -> None:
    """What is sampled must be what is scored, whatever the model's generation_config.json says."""
    model = new_tiny()
    setattr(model.generation_config, name, value)
    assert sample(model) == sample(tiny)


# ---------------------------------------------------------------- batches


def naive(model: Any, prompt: list[int], key: Any, ends: list[int], length: int = 12) -> SampledResponse:
    """One response by whole forward passes: no cache, no batch, no padding."""
    u = torch.from_numpy(uniforms([key], length))[0]
    ids = list(prompt)
    for step in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        ids.append(int(draw(logits[None], u[step : step + 1], 1.0)[0]))
        if ids[-1] in ends:
            break
    return SampledResponse(ids[len(prompt) :], truncated=ids[-1] not in ends)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_log_probability_of_what_was_drawn(tiny: Any, temperature: float) -> None:
    """Up to the stop token and with it, at the temperature of sampling; at 0 the draw is certain."""
    ends = sorted({s.ids[4] for s in sample(tiny, temperature=temperature, eos_ids=[2047])})
    drawn = sample(tiny, temperature=temperature, eos_ids=ends, batch_size=4)
    assert len({len(response.ids) for response in drawn}) > 1
    for prompt, response in zip(PROMPTS, drawn, strict=True):
        with torch.no_grad():
            logits = tiny(torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1].double()
        logps = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response.ids)[:, None])
        assert response.logp == pytest.approx(logps.sum().item(), abs=1e-4)
    assert all(response.logp == 0 for response in sample(tiny, temperature=0.0))


def test_the_same_tokens_as_whole_forward_passes(tiny: Any) -> None:
    """Several samples of one prompt, among prompts of other lengths, some of which end early and leave the batch."""
    prompts = [ids for ids in PROMPTS for _ in range(5)]
    keys = [(1, i) for i in range(len(prompts))]
    ends = sorted({s.ids[k] for s in sample(tiny, prompts, keys, eos_ids=[2047]) for k in (2, 5)})[:8]
    expected = [naive(tiny, prompt, key, ends) for prompt, key in zip(prompts, keys, strict=True)]
    assert 5 <= sum(s.truncated for s in expected) <= 25
    assert sample(tiny, prompts, keys, eos_ids=ends) == expected


@pytest.mark.parametrize("every", [3, 100])
def test_rows_that_ended_unseen_are_cut_off(tiny: Any, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """A GPU is asked for the rows that ended after so many tokens: until then they draw on."""
    prompts = [ids for ids in PROMPTS for _ in range(5)]
    keys = [(1, i) for i in range(len(prompts))]
    ends = sorted({s.ids[k] for s in sample(tiny, prompts, keys, eos_ids=[2047]) for k in (1, 4)})[:8]
    passes: list[int] = []
    hook = tiny.lm_head.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    try:
        expected = sample(tiny, prompts, keys, eos_ids=ends)
        rows_of_every_token, passes[:] = list(passes), []
        monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", every)
        assert sample(tiny, prompts, keys, eos_ids=ends) == expected
    finally:
        hook.remove()
    assert len({len(response.ids) for response in expected}) > 2
    assert sum(passes) > sum(rows_of_every_token)


def test_eager_attention_stays_what_the_model_trains_with(tiny_ref: Any, tiny: Any) -> None:
    section = ModelSection(name="tiny", dtype="float32", lora=None, attn_implementation="eager")
    model = load_policy(tiny_ref, section)
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(model.config._attn_implementation))
    assert sample(model) == sample(tiny)
    assert set(seen) == {"sdpa"} and model.config._attn_implementation == "eager"


def test_prompts_of_unequal_length_in_bf16_with_fp32_weights(tiny: Any) -> None:
    """As all weights train: what pads the shorter prompts on the left is not seen."""
    logits: list[torch.Tensor] = []
    hook = tiny.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[:, -1].float()))
    try:
        sample(tiny, [[5, 6, 7, 8, 9, 10, 11], [12, 13]], [(0,), (1,)], dtype=torch.bfloat16, max_new_tokens=1)
        sample(tiny, [[12, 13]], [(1,)], dtype=torch.bfloat16, max_new_tokens=1)
    finally:
        hook.remove()
    together, alone = logits
    assert bool(together.isfinite().all())
    assert float((together - alone).abs().amax(1).min()) < 0.1  # one of the two rows is the short prompt's


def test_a_model_whose_state_runs_through_the_row() -> None:
    """No prompt is shared and no row leaves: the cache has no rows to choose from."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [[5, 7, 9], [5, 7, 9], [8, 10, 11]]
    keys = [(2, i) for i in range(3)]
    expected = [naive(model, prompt, key, [2]) for prompt, key in zip(prompts, keys, strict=True)]
    assert sample(model, prompts, keys) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_size_changes_nothing(tiny: Any, batch_size: int) -> None:
    assert sample(tiny, batch_size=batch_size) == sample(tiny, batch_size=64)


def test_the_order_changes_nothing(tiny: Any) -> None:
    order = [3, 0, 5, 1, 4, 2]
    turned = sample(tiny, [PROMPTS[i] for i in order], [KEYS[i] for i in order], batch_size=4)
    assert turned == [sample(tiny)[i] for i in order]


def test_keys_and_not_places_seed_the_samples(tiny: Any) -> None:
    twice = sample(tiny, [PROMPTS[1]] * 3, [KEYS[0], KEYS[1], KEYS[0]])
    assert twice[0] == twice[2] != twice[1]


def test_progress_counts_every_prompt(tiny: Any) -> None:
    seen: list[int] = []
    sample(tiny, batch_size=4, advance=lambda n, tokens: seen.append(n))
    assert seen == [4, 2]


# ---------------------------------------------------------------- ends


class Scripted:
    """Bends the logits of a model so that it says chosen tokens, by the number of tokens that it has been fed."""

    def __init__(self, model: Any, script: dict[int, int]) -> None:
        self.model, self.script = model, script
        self.handle = model.lm_head.register_forward_hook(self._bend)
        self.position = model.model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.last = int(kwargs["position_ids"].max()) if kwargs.get("position_ids") is not None else 0

    def _bend(self, module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        wanted = self.script.get(self.last)
        if wanted is not None:
            logits = torch.full_like(logits, -1e4)
            logits[..., wanted] = 1e4
        return logits


@pytest.mark.parametrize(("end", "eos_ids"), [(2, [2]), (2, [2, 900]), (900, [2, 900])])
def test_any_of_several_ends_is_the_last_id(new_tiny: Make, end: int, eos_ids: list[int]) -> None:
    model = new_tiny()
    Scripted(model, {1: 50, 2: 51, 3: end, 4: 52, 5: 53})
    responses = sample(model, [[5, 6]], [(0,)], eos_ids=eos_ids, max_new_tokens=5)
    assert responses == [SampledResponse([50, 51, end], truncated=False)]


def test_an_end_on_the_last_place_is_no_truncation(new_tiny: Make) -> None:
    model = new_tiny()
    Scripted(model, {1: 50, 2: 51, 3: 2})
    assert sample(model, [[5, 6]], [(0,)], max_new_tokens=3) == [SampledResponse([50, 51, 2], truncated=False)]
    assert sample(model, [[5, 6]], [(0,)], max_new_tokens=2) == [SampledResponse([50, 51], truncated=True)]


def test_an_id_that_is_no_end_here_does_not_end(new_tiny: Make) -> None:
    """The tokenizer's EOS (2) goes on where the run's ends are others; the model's own settings do not stop it."""
    model = new_tiny()
    Scripted(model, {1: 2, 2: 51, 3: 0, 4: 900})
    responses = sample(model, [[5, 6]], [(0,)], eos_ids=[900], max_new_tokens=6)
    assert responses == [SampledResponse([2, 51, 0, 900], truncated=False)]


def test_an_end_in_the_prompt_does_not_count(new_tiny: Make) -> None:
    model = new_tiny()
    Scripted(model, {3: 50, 4: 51})
    for prompt in ([2, 5, 6, 7], [5, 6, 7, 2], [0, 0, 0, 2]):
        assert sample(model, [prompt], [(0,)], max_new_tokens=2) == [SampledResponse([50, 51], truncated=True)]


def test_a_neighbour_that_ends_early_does_not_end_the_others(tiny: Any) -> None:
    """Each sample of a long batch equals the sample alone, up to its first end."""
    ends = sorted({s.ids[3] for s in sample(tiny, eos_ids=[2047])})[:2]
    together = sample(tiny, eos_ids=ends)
    assert len({len(s.ids) for s in together}) > 1
    for prompt, key, response in zip(PROMPTS, KEYS, together, strict=True):
        assert sample(tiny, [prompt], [key], eos_ids=ends) == [response]
        assert response.truncated == (response.ids[-1] not in ends)
        assert not set(response.ids[:-1]) & set(ends)


def test_all_of_a_models_ends(new_tiny: Make, tokenizer: Any) -> None:
    model = new_tiny()
    model.generation_config.eos_token_id = [7, 2]
    assert eos_ids(model, tokenizer) == [2, 7]
    model.generation_config.eos_token_id = None
    assert eos_ids(model, tokenizer) == [2]


def test_the_end_that_responses_are_trained_with_ends_a_sample(new_tiny: Make, tiny_ref: Any) -> None:
    """A chat template may close turns with another token than the EOS of tokenizer and model: it must stop too."""
    tokenizer = load_tokenizer(tiny_ref)
    tokenizer.eos_token = "<|endoftext|>"
    model = new_tiny()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    end = response_end(tokenizer, conversational=True)
    assert tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    assert end in eos_ids(model, tokenizer)


# ---------------------------------------------------------------- adapters


def test_sampling_happens_with_the_adapter_and_leaves_it_in_place(new_tiny: Make, tiny: Any) -> None:
    model = adapter(new_tiny())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with_adapter = sample(model)
    merged = sample(model.merge_and_unload())
    assert with_adapter == merged
    assert with_adapter != sample(tiny)
    model = adapter(new_tiny())
    sample(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
