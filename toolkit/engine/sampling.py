"""Sampling n responses for each prompt, the same for any batch size.

Every response has its own stream of uniform numbers, seeded by a key that says what it is (seed, purpose, prompt,
sample), and each token is drawn by inverting the cumulative distribution. So a response does not depend on its
neighbours in the batch, on resume or on the number of processes. And one uniform number per token costs less than
``torch.multinomial``, which draws an exponential for each entry of the vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from toolkit.engine.decoding import Rows, decode
from toolkit.engine.distributed import map_batches
from toolkit.engine.fast import speedups
from toolkit.engine.fixed_decoding import FixedDecoder
from toolkit.models.inspect import inner, precision
from toolkit.models.tokenizer import eos_ids


@dataclass(frozen=True)
class SamplingParams:
    """How to sample: ``n`` responses for each prompt, of at most ``max_new_tokens`` tokens, the end among them.

    ``stop_token_ids`` end a response; None takes all that tokenizer, chat template and generation configuration name.
    ``fixed_shapes``: decode with tensors of fixed shape, and on a GPU with a CUDA graph, where the model allows it
    (``engine/fixed_decoding.py``); None does so on a GPU. It changes responses by the rounding of another kernel alone.
    """

    max_new_tokens: int
    temperature: float = 1.0
    n: int = 1
    batch_size: int = 64
    stop_token_ids: Sequence[int] | None = None
    fixed_shapes: bool | None = None


@dataclass(frozen=True)
class SampledResponse:
    """One sampled response. ``truncated`` says that it reached the length limit without an end of text.

    ``logp``: its log-probability under the distribution that it was drawn from, in nats. A batch of another size rounds
    otherwise, so equality does not ask for it.
    """

    ids: list[int]
    truncated: bool
    logp: float = field(default=math.nan, compare=False)


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
    """One response for each prompt; ``keys[i]`` seeds the i-th. Of ``params`` it takes all but
    ``n`` and ``stop_token_ids``.

    No top-k, no top-p, no penalty: the distribution that is sampled is the one that is scored. A stop token that the
    model emits is the response's last id. Adapters are merged into the weights until all responses are there.
    """
    device = next(model.parameters()).device
    fixed = (
        FixedDecoder(inner(model), params.temperature, stop_token_ids, dtype)
        if (device.type == "cuda" if params.fixed_shapes is None else params.fixed_shapes)
        else None
    )
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches = [order[start : start + params.batch_size] for start in range(0, len(order), params.batch_size)]

    def compute(indices: list[int]) -> list[SampledResponse]:
        uniform = torch.from_numpy(uniforms([keys[i] for i in indices], params.max_new_tokens)).to(device)
        rows = Rows(inner(model), [prompts[i] for i in indices], params.max_new_tokens, pad_id, device)
        if fixed is None:
            batch = decode(rows, uniform, params.temperature, stop_token_ids)
        else:
            batch = fixed.decode(rows, uniform)
        responses = []
        for ids, logps in batch:
            end = next((k for k, token in enumerate(ids) if token in stop_token_ids), None)
            length = len(ids) if end is None else end + 1
            responses.append(SampledResponse(ids[:length], end is None, math.fsum(logps[:length])))
        return responses

    def done(responses: list[SampledResponse]) -> None:
        if advance is not None:
            advance(len(responses), tokens=sum(len(response.ids) for response in responses))

    with torch.inference_mode(), speedups.decoding(inner(model), dtype), _autocast(model, device, dtype):
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
