"""Sampling n responses for each prompt, the same for any batch size.

Every response has its own stream of uniform numbers, seeded by a key that says what it is (seed, purpose, prompt,
sample), and each token is drawn by inverting the cumulative distribution. So a response does not depend on its
neighbours in the batch, on resume or on the number of processes. And one uniform number per token costs less than
``torch.multinomial``, which draws an exponential for each entry of the vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from toolkit.engine.distributed import map_batches
from toolkit.engine.fast import speedups
from toolkit.models.inspect import backbone, inner, precision
from toolkit.models.tokenizer import eos_ids

# Rows that have come to an end leave a batch when they are this share of it: leaving copies the cache.
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
    """One sampled response. ``truncated`` says that it reached the length limit without an end of text.

    ``logp``: its log-probability under the distribution that it was drawn from, in nats. A batch of another size rounds
    otherwise, so equality does not ask for it.
    """

    ids: list[int]
    truncated: bool
    logp: float = field(default=math.nan, compare=False)


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] tokens from [R, V] logits and [R] uniform numbers, by inverting the cumulative distribution; [R] their logps.

    At temperature 0, the likeliest token, which then has all the probability.
    """
    if temperature == 0.0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    scaled = logits if temperature == 1.0 else logits.float() / temperature
    probabilities = scaled.softmax(-1, dtype=torch.float32)
    cumulative = probabilities.cumsum(-1)
    # The last entry is 1 up to rounding: scaling by it keeps the draw inside the support.
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    return token.squeeze(1), probabilities.gather(1, token).squeeze(1).log()


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
    responses = generate(
        model,
        [ids for ids in prompts for _ in range(n)],
        [key(i, k) for i in range(len(prompts)) for k in range(n)],
        params,
        stop_token_ids=eos_ids(inner(model), tokenizer) if stop is None else stop,
        pad_id=int(tokenizer.pad_token_id),
        dtype=dtype,
        advance=advance,
    )
    return [responses[i * n : (i + 1) * n] for i in range(len(prompts))]


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    keys: Sequence[Sequence[object]],
    params: SamplingParams,
    *,
    stop_token_ids: Sequence[int],
    pad_id: int,
    dtype: torch.dtype,
    advance: Callable[..., None] | None = None,
) -> list[SampledResponse]:
    """One response for each prompt; ``keys[i]`` seeds the i-th. Of ``params`` it takes length, temperature, batch size.

    No top-k, no top-p, no penalty: the distribution that is sampled is the one that is scored. A stop token that the
    model emits is the response's last id. Adapters are merged into the weights until all responses are there.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches = [order[start : start + params.batch_size] for start in range(0, len(order), params.batch_size)]

    def compute(indices: list[int]) -> list[SampledResponse]:
        uniform = torch.from_numpy(uniforms([keys[i] for i in indices], params.max_new_tokens)).to(device)
        # No name for the rows: the cache of one batch must be gone before that of the next is made.
        batch = _decode(
            _Rows(inner(model), [prompts[i] for i in indices], pad_id, device),
            uniform,
            params.temperature,
            stop_token_ids,
        )
        responses = []
        for ids, logps in batch:
            end = next((k for k, token in enumerate(ids) if token in stop_token_ids), None)
            length = len(ids) if end is None else end + 1
            responses.append(SampledResponse(ids[:length], end is None, math.fsum(logps[:length])))
        return responses

    def done(responses: list[SampledResponse]) -> None:
        if advance is not None:
            advance(len(responses), tokens=sum(len(response.ids) for response in responses))

    with torch.inference_mode(), speedups.decoding(inner(model)), _autocast(model, device, dtype):
        sampled = map_batches(batches, compute, done)
    by_index = {
        i: response
        for indices, of in zip(batches, sampled, strict=True)
        for i, response in zip(indices, of, strict=True)
    }
    return [by_index[i] for i in range(len(prompts))]


def _autocast(model: Any, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Nothing where the weights have the precision already: autocast costs a lookup for each product."""
    same = next(inner(model).parameters()).dtype == dtype
    return nullcontext() if same else precision(device, dtype)


def _decode(
    rows: _Rows, uniform: torch.Tensor, temperature: float, stop_token_ids: Sequence[int]
) -> list[tuple[list[int], list[float]]]:
    """Token ids and their log-probabilities of one batch, with anything after the first stop token.

    ``uniform`` is [R, max_new_tokens]. Rows that have come to an end leave the batch.
    """
    out = torch.full(uniform.shape, rows.pad_id, device=uniform.device)
    logps = torch.zeros(uniform.shape, device=uniform.device)
    stop = torch.tensor(list(stop_token_ids), device=uniform.device)
    index = torch.arange(len(out), device=uniform.device)  # which response each row is
    unfinished = torch.ones_like(index, dtype=torch.bool)
    for step in range(uniform.shape[1]):
        token, logp = draw(rows.logits, uniform[index, step], temperature)
        out[index, step], logps[index, step] = token, logp
        unfinished &= ~torch.isin(token, stop)
        n_left = int(unfinished.sum())
        if not n_left or step + 1 == uniform.shape[1]:
            break
        if rows.cache is not None and n_left <= (1 - LEAVE_SHARE) * len(index):
            rows.select(unfinished)
            index, token, unfinished = index[unfinished], token[unfinished], unfinished[unfinished]
        rows.append(token)
    return list(zip(out.tolist(), logps.tolist(), strict=True))


class _Rows:
    """A batch of rows that grow by one token at a time. ``logits`` [R, V] are those of each row's next token.

    A prompt is computed once however often the batch has it. A model whose state runs through the row has no
    cache whose rows could be selected: it computes every row from its start for each token.
    """

    def __init__(self, model: Any, prompts: Sequence[list[int]], pad_id: int, device: torch.device) -> None:
        self.model, self.pad_id = model, pad_id
        self.cache = speedups.row_cache(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        distinct: list[list[int]] = list(prompts)
        if self.cache is not None:  # each at the place of its last copy
            last = {tuple(ids): row for row, ids in enumerate(prompts)}
            distinct = [prompts[row] for row in sorted(last.values())]
        width = max(map(len, prompts))
        ids = torch.full((len(distinct), width), pad_id)
        mask = torch.zeros((len(distinct), width), dtype=torch.long)
        for row, prompt in enumerate(distinct):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.ids, self.mask = ids.to(device), mask.to(device)
        self.position = (self.mask.cumsum(1) - 1).clamp(min=0)
        if self.cache is not None and width > 1:
            self._fill_cache()
        self.logits = self._next_logits()
        if len(distinct) < len(prompts):
            place = {tuple(prompt): row for row, prompt in enumerate(distinct)}
            copies = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
            self.select(copies)
            self.logits = self.logits[copies]

    def _fill_cache(self) -> None:
        """Compute all but the last token of each row, without logits.

        The last token is left for :meth:`_next_logits`. torch multiplies a slice of several positions with frozen
        weights as one product for each row, and copies the unembedding for each.
        """
        inputs = {"position_ids": self.position[:, :-1]} if self.takes_positions else {}
        backbone(self.model)(
            input_ids=self.ids[:, :-1],
            attention_mask=self.mask[:, :-1],
            past_key_values=self.cache,
            use_cache=True,
            **inputs,
        )
        self.ids, self.position = self.ids[:, -1:], self.position[:, -1:]

    def _next_logits(self) -> torch.Tensor:
        inputs: dict[str, Any] = {"past_key_values": self.cache} if self.cache is not None else {}
        if self.takes_positions:
            inputs["position_ids"] = self.position
        output = self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=self.cache is not None, **inputs)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def select(self, rows: torch.Tensor) -> None:
        """Make the batch one of these rows, by index or by a mask, up to its logits. It needs a cache."""
        assert self.cache is not None
        speedups.select_rows(self.cache, rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    def append(self, token: torch.Tensor) -> None:
        """[R] the next token of each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        position = self.position[:, -1:] + 1
        if self.cache is not None:
            self.ids, self.position = token[:, None], position
        else:
            self.ids = torch.cat([self.ids, token[:, None]], dim=1)
            self.position = torch.cat([self.position, position], dim=1)
        self.logits = self._next_logits()
