"""Sampling n responses for each prompt, the same for any batch size.

Every response has its own stream of uniform numbers, seeded by what it is (seed, purpose, prompt, sample), and
each token is drawn by inverting the cumulative distribution. So a response does not depend on its neighbours in
the batch, on resume or on the number of processes; and one uniform per token costs less than the vocabulary of
exponentials that ``torch.multinomial`` draws.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from toolkit.engine.fast import speedups
from toolkit.models.inspect import backbone, inner, precision
from toolkit.models.tokenizer import eos_ids

# Finished rows leave a batch when they are this share of it: leaving copies the cache.
LEAVE_SHARE = 0.1


@dataclass(frozen=True)
class SamplingParams:
    """How to sample: ``n`` responses for each prompt, of at most ``max_new_tokens`` tokens, the end among them.

    ``stop_token_ids`` end a response; None takes all that tokenizer, chat template and generation configuration name.
    """

    max_new_tokens: int
    temperature: float = 1.0
    n: int = 1
    batch_size: int = 64
    stop_token_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class SampledResponse:
    """One sampled response. ``truncated`` says that it reached the length limit without an end of text."""

    ids: list[int]
    truncated: bool


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """[R] tokens from [R, V] logits and [R] uniform numbers, by inverting the cumulative distribution.

    The likeliest token at temperature 0.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits if temperature == 1.0 else logits.float() / temperature
    cumulative = scaled.softmax(-1, dtype=torch.float32).cumsum(-1)
    # The last entry is 1 up to rounding: scaling by it keeps the draw inside the support.
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1).squeeze(1)


def uniforms(keys: Sequence[Sequence[object]], length: int) -> np.ndarray:
    """[len(keys), length] fp32 uniform numbers in [0, 1), each row a function of its key alone."""
    out = np.empty((len(keys), length), dtype=np.float32)
    for row, key in enumerate(keys):
        digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
        out[row] = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big"))).random(
            length, dtype=np.float32
        )
    return out


def sample_responses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    key: Callable[[int, int], Sequence[object]],
    params: SamplingParams,
    *,
    dtype: torch.dtype,
    advance: Callable[..., None] | None = None,
) -> list[list[SampledResponse]]:
    """For each prompt, ``params.n`` responses; ``key(i, k)`` seeds the k-th of the i-th prompt.

    ``advance(n, tokens=...)`` is told of every ``n`` responses that are done.
    """
    n, stop = params.n, params.stop_token_ids
    samples = generate(
        model,
        [ids for ids in prompts for _ in range(n)],
        [key(i, k) for i in range(len(prompts)) for k in range(n)],
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        eos_ids=eos_ids(inner(model), tokenizer) if stop is None else stop,
        pad_id=int(tokenizer.pad_token_id),
        dtype=dtype,
        batch_size=params.batch_size,
        advance=advance,
    )
    return [samples[i * n : (i + 1) * n] for i in range(len(prompts))]


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    keys: Sequence[Sequence[object]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_ids: Sequence[int],
    pad_id: int,
    dtype: torch.dtype,
    batch_size: int = 64,
    advance: Callable[..., None] | None = None,
) -> list[SampledResponse]:
    """One response for each prompt; ``keys[i]`` seeds the i-th. Adapters are merged for the while.

    No top-k, no top-p, no penalty: the distribution that is sampled is the one that is scored.
    An EOS that the model emits is the response's last id.
    """
    device = next(model.parameters()).device
    out: list[SampledResponse | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    with (
        torch.inference_mode(),
        speedups.decoding(inner(model)),
        _autocast(model, device, dtype),
    ):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            draws = torch.from_numpy(uniforms([keys[i] for i in indices], max_new_tokens)).to(device)
            sampled = _decode(inner(model), [prompts[i] for i in indices], draws, temperature, list(eos_ids), pad_id)
            for i, ids in zip(indices, sampled, strict=True):
                end = next((k for k, token in enumerate(ids) if token in eos_ids), None)
                out[i] = SampledResponse(ids if end is None else ids[: end + 1], truncated=end is None)
            if advance is not None:
                advance(len(indices), tokens=sum(len(sample.ids) for i in indices if (sample := out[i]) is not None))
    return [sample for sample in out if sample is not None]


def _autocast(model: Any, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Nothing where the weights have the precision already: autocast costs a lookup for each product."""
    same = next(inner(model).parameters()).dtype == dtype
    return nullcontext() if same else precision(device, dtype)


def _decode(
    model: Any, prompts: list[list[int]], draws: torch.Tensor, temperature: float, eos_ids: list[int], pad_id: int
) -> list[list[int]]:
    """Token ids of one batch, with anything behind the first EOS: ``draws`` [R, max_new_tokens].

    A prompt is computed once however often it stands in the batch, and finished rows leave it. A model whose state
    runs through the row has no cache that could do so: it computes every row from its start for each token.
    """
    device = draws.device
    cache = speedups.row_cache(model)
    rows = torch.arange(len(prompts), device=device)
    unique = (
        sorted({tuple(ids): row for row, ids in enumerate(prompts)}.values()) if cache is not None else rows.tolist()
    )
    width = max(map(len, prompts))
    ids = torch.full((len(unique), width), pad_id)
    mask = torch.zeros((len(unique), width), dtype=torch.long)
    for row, i in enumerate(unique):
        ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
        mask[row, width - len(prompts[i]) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    positioned = "position_ids" in inspect.signature(model.forward).parameters

    def next_logits() -> torch.Tensor:
        inputs: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
        inputs |= {"position_ids": position} if positioned else {}
        return model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **inputs).logits[:, -1]

    if cache is not None and width > 1:
        # The last token apart: torch multiplies a slice of several positions with frozen weights as one product a row,
        # each with a copy of the unembedding (11 GB for 200 rows of SmolLM2-135M, and 17 s).
        inputs = {"position_ids": position[:, :-1]} if positioned else {}
        backbone(model)(
            input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True, **inputs
        )
        ids, position = ids[:, -1:], position[:, -1:]
    logits = next_logits()
    if cache is not None and len(unique) < len(prompts):
        place = {tuple(prompts[i]): row for row, i in enumerate(unique)}
        owner = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
        speedups.select_rows(cache, owner)
        logits, mask, position = logits[owner], mask[owner], position[owner]

    out = torch.full(draws.shape, pad_id, device=device)
    ends = torch.tensor(eos_ids, device=device)
    going = torch.ones_like(rows, dtype=torch.bool)
    for step in range(draws.shape[1]):
        token = draw(logits, draws[rows, step], temperature)
        out[rows, step] = token
        going &= ~torch.isin(token, ends)
        left = int(going.sum())
        if not left or step + 1 == draws.shape[1]:
            break
        if cache is not None and left <= (1 - LEAVE_SHARE) * len(rows):
            speedups.select_rows(cache, going)
            rows, token, mask, position, going = (t[going] for t in (rows, token, mask, position, going))
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        following = position[:, -1:] + 1
        if cache is not None:
            ids, position = token[:, None], following
        else:
            ids, position = torch.cat([ids, token[:, None]], dim=1), torch.cat([position, following], dim=1)
        logits = next_logits()
    return out.tolist()
