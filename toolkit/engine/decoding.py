"""Decoding a batch of rows, token by token, each drawn with the row's own uniform numbers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from toolkit.engine.fast import speedups
from toolkit.models.inspect import backbone

# Rows that have come to an end leave a batch when they are this share of it: leaving copies the cache.
LEAVE_SHARE = 0.1
# After how many tokens the host looks which rows have ended. On a GPU the answer waits for all that was queued, and
# Python has nothing to queue meanwhile. What a row draws after its end is cut off.
LOOK_EVERY = {"cpu": 1, "cuda": 16}


def look_every(device: torch.device) -> int:
    return LOOK_EVERY.get(device.type, LOOK_EVERY["cuda"])


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


def decode(
    rows: Rows, uniform: torch.Tensor, temperature: float, stop_token_ids: Sequence[int]
) -> list[tuple[list[int], list[float]]]:
    """Token ids and their log-probabilities of one batch, with anything after the first stop token.

    ``uniform`` is [R, max_new_tokens]. Rows that have come to an end leave the batch.
    """
    rows.expand()
    out = torch.full(uniform.shape, rows.pad_id, device=uniform.device)
    logps = torch.zeros(uniform.shape, device=uniform.device)
    stop = torch.tensor(list(stop_token_ids), device=uniform.device)
    index = torch.arange(len(out), device=uniform.device)  # which response each row is
    unfinished = torch.ones_like(index, dtype=torch.bool)
    for step in range(uniform.shape[1]):
        token, logp = draw(rows.logits, uniform[index, step], temperature)
        out[index, step], logps[index, step] = token, logp
        unfinished &= ~torch.isin(token, stop)
        if step + 1 == uniform.shape[1]:
            break
        if (step + 1) % look_every(uniform.device) == 0:
            n_left = int(unfinished.sum())
            if not n_left:
                break
            if rows.cache is not None and n_left <= (1 - LEAVE_SHARE) * len(index):
                rows.select(unfinished)
                index, token, unfinished = index[unfinished], token[unfinished], unfinished[unfinished]
        rows.append(token)
    return list(zip(out.tolist(), logps.tolist(), strict=True))


class Rows:
    """A batch of rows that grow by one token at a time. ``logits`` [R, V] are those of each row's next token.

    A row takes at most ``new_tokens``. A prompt is computed once however often the batch has it: until :meth:`expand`,
    there is one row for each distinct prompt, and ``copies`` says which one each response begins with. A model whose
    state runs through the row has no cache whose rows could be selected: it computes every row from its start for each
    token.
    """

    def __init__(
        self, model: Any, prompts: Sequence[list[int]], new_tokens: int, pad_id: int, device: torch.device
    ) -> None:
        self.model, self.pad_id = model, pad_id
        self.cache = speedups.row_cache(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        distinct: list[list[int]] = list(prompts)
        if self.cache is not None:  # each at the place of its last copy
            last = {tuple(ids): row for row, ids in enumerate(prompts)}
            distinct = [prompts[row] for row in sorted(last.values())]
        width = max(map(len, prompts))
        ids = torch.full((len(distinct), width), pad_id)
        mask = torch.zeros((len(distinct), width + new_tokens), dtype=torch.long)
        for row, prompt in enumerate(distinct):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.ids, self._mask, self.width = ids.to(device), mask.to(device), width
        self.position = (self.mask.cumsum(1) - 1).clamp(min=0)
        if self.cache is not None and width > 1:
            self._fill_cache()
        self.logits = self._next_logits()
        place = {tuple(prompt): row for row, prompt in enumerate(distinct)}
        same = len(distinct) == len(prompts)
        self.copies = torch.tensor(
            range(len(prompts)) if same else [place[tuple(prompt)] for prompt in prompts], device=device
        )

    def expand(self) -> None:
        """Make a row for each response."""
        if len(self.copies) > len(self.logits):
            self.select(self.copies)
            self.logits = self.logits[self.copies]

    @property
    def mask(self) -> torch.Tensor:
        """[R, T] 1 for each of a row's tokens, 0 for what pads it on the left."""
        return self._mask[:, : self.width]

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
        self._mask, self.position = self._mask[rows], self.position[rows]

    def append(self, token: torch.Tensor) -> None:
        """[R] the next token of each row."""
        self.width += 1
        position = self.position[:, -1:] + 1
        if self.cache is not None:
            self.ids, self.position = token[:, None], position
        else:
            self.ids = torch.cat([self.ids, token[:, None]], dim=1)
            self.position = torch.cat([self.position, position], dim=1)
        self.logits = self._next_logits()
