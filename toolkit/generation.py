"""Sampling n responses for each prompt, the same for any batch size.

Every response has its own stream of uniform numbers, seeded by what it is (seed, purpose, prompt, sample), and
each token is drawn by inverting the cumulative distribution. So a response does not depend on its neighbours in
the batch, on resume or on the number of processes; and one uniform per token costs less than the vocabulary of
exponentials that ``torch.multinomial`` draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from toolkit import models
from toolkit.models import inner


@dataclass(frozen=True)
class Sample:
    """One sampled response. ``truncated`` says that it reached the length limit without an end of text."""

    ids: list[int]
    truncated: bool


class InverseCdf(LogitsProcessor):
    """Draw the next token with a given uniform number; the greedy choice that follows then takes it."""

    def __init__(self, uniforms: torch.Tensor, temperature: float, prompt_length: int) -> None:
        self.uniforms, self.temperature, self.prompt_length = uniforms, temperature, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        cumulative = (scores.float() / self.temperature).softmax(-1).cumsum(-1)
        # The last entry is 1 up to rounding: scaling by it keeps the draw inside the support.
        draw = self.uniforms[:, step, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, draw, right=True).clamp_(max=scores.shape[-1] - 1)
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(1, token, 0.0)


def uniforms(keys: Sequence[Sequence[object]], length: int) -> np.ndarray:
    """[len(keys), length] fp32 uniform numbers in [0, 1), each row a function of its key alone."""
    out = np.empty((len(keys), length), dtype=np.float32)
    for row, key in enumerate(keys):
        digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
        out[row] = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big"))).random(
            length, dtype=np.float32
        )
    return out


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Without the model's generation configuration, whose penalties and suppressed tokens would fill our gaps."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


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
    advance: Callable[[int], None] | None = None,
) -> list[Sample]:
    """One response for each prompt; ``keys[i]`` seeds the i-th. Adapters are merged for the while.

    No top-k, no top-p, no penalty: the distribution that is sampled is the one that is scored.
    An EOS that the model emits is the response's last id.
    """
    device = next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
        num_beams=1,
        use_cache=True,
    )
    ends = set(eos_ids)
    out: list[Sample | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    with torch.inference_mode(), models.merged(model), _own_settings(inner(model)):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in indices)
            input_ids = torch.full((len(indices), width), pad_id)
            mask = torch.zeros((len(indices), width), dtype=torch.long)
            for row, i in enumerate(indices):
                input_ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            draws = torch.from_numpy(uniforms([keys[i] for i in indices], max_new_tokens)).to(device)
            with models.precision(device, dtype):
                sequences = model.generate(
                    input_ids=input_ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([InverseCdf(draws, temperature, width)]),
                )
            for i, ids in zip(indices, sequences[:, width:].tolist(), strict=True):
                end = next((k for k, token in enumerate(ids) if token in ends), None)
                out[i] = Sample(ids if end is None else ids[: end + 1], truncated=end is None)
            if advance is not None:
                advance(len(indices))
    return [sample for sample in out if sample is not None]
