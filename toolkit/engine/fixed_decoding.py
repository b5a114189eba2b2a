"""Decoding batches with tensors of fixed shape: on a GPU, one replay of a CUDA graph for each token.

Without a graph the device waits for Python, which starts the hundreds of kernels of a token one by one. A graph starts
them at once, and takes what it computes with from the same places each time. So a batch has its room from the start,
the number of the token stands on the device, and rows that came to an end stay until all have.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from toolkit.engine.decoding import Rows, decode, draw, look_every
from toolkit.engine.engine import REFUSALS
from toolkit.engine.fast import fixed_cache
from toolkit.engine.fast.attention import grouped_query
from toolkit.models.inspect import attention_window
from toolkit.models.sharding import is_sharded

# A batch's length is a multiple of this, so that the next one, whose prompts are a little shorter, has the same.
LENGTHS = 64
# A response of fewer tokens is done before a graph is made.
LEAST_TOKENS = 16
# How far the distributions of the first tokens may be from those without fixed shapes, in total variation. A wrong mask
# or position moves them by a tenth or more; rounding moves them by this much at most.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# Where a step is captured, and the least share of the first tokens that the graph has to draw as the step does.
GRAPHS = {"cuda"}
LEAST_SAME = 0.9

_log = logging.getLogger(__name__)
# Kinds of models that are decoded without fixed shapes in this process: class, precision of weights and of products.
REFUSED: set[tuple[type, torch.dtype, torch.dtype]] = set()


class FixedDecoder:
    """Decodes the batches of one model, one after another, as :func:`decode` does.

    A batch that fits into the last one's shape takes its place, and its graph. A model that refuses fixed shapes, or
    computes something else with them, is decoded without, which is said once.
    """

    def __init__(self, model: Any, temperature: float, stop_token_ids: Sequence[int], dtype: torch.dtype) -> None:
        self.model, self.temperature, self.stop_token_ids, self.dtype = model, temperature, stop_token_ids, dtype
        self.kind = (type(model), next(model.parameters()).dtype, dtype)
        self.batch: _FixedBatch | None = None

    def decode(self, rows: Rows, uniform: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        """As :func:`decode`."""
        if self._suits(rows, uniform):
            with grouped_query(self.model):
                if self.batch is None or not self.batch.fits(rows, uniform):
                    self.batch = None  # its memory goes first
                    self.batch = self._new_batch(rows, uniform)
                if self.batch is not None:
                    return self.batch.decode(rows, uniform)
        return decode(rows, uniform, self.temperature, self.stop_token_ids)

    def _suits(self, rows: Rows, uniform: torch.Tensor) -> bool:
        """Whether each token's keys and values, positions and a mask are all that the model's next token depends on."""
        if self.kind in REFUSED or rows.cache is None or not rows.takes_positions:
            return False
        length, window = _length(rows, uniform), attention_window(self.model)
        return (
            uniform.shape[1] >= LEAST_TOKENS
            and (window is None or window >= length)
            and fixed_cache.can_be_fixed(rows.cache, length)
            and {weight.device for weight in self.model.parameters()} == {uniform.device}
            and not any(is_sharded(module) for module in self.model.modules())
        )

    def _new_batch(self, rows: Rows, uniform: torch.Tensor) -> _FixedBatch | None:
        try:
            batch = _FixedBatch(self.model, rows, uniform, self.temperature, self.stop_token_ids, self.dtype)
            off = batch.difference(rows, uniform)
            if not off <= TOLERANCE[self.dtype]:  # nor is NaN
                why = f"the first tokens' distributions are off by {off:.2g}"
            elif uniform.device.type in GRAPHS and (same := batch.capture(rows, uniform)) < LEAST_SAME:
                why = f"a graph draws {1 - same:.0%} of the first tokens otherwise"
            else:
                return batch
        except torch.OutOfMemoryError:  # a smaller batch may have room
            _log.warning("a batch of %s rows has no room for a CUDA graph, and is sampled without", len(uniform))
            return None
        except REFUSALS as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        REFUSED.add(self.kind)
        _log.warning("%s is sampled without a CUDA graph (%s), which is slower", type(self.model).__name__, why)
        return None


def _length(rows: Rows, uniform: torch.Tensor) -> int:
    """Tokens of the longest row with its response, rounded up."""
    return -(-(rows.width + uniform.shape[1]) // LENGTHS) * LENGTHS


class _FixedBatch:
    """The tensors of a batch, and a step that computes on them alone."""

    def __init__(
        self,
        model: Any,
        rows: Rows,
        uniform: torch.Tensor,
        temperature: float,
        stop_token_ids: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        assert rows.cache is not None
        device, n_rows = uniform.device, len(uniform)
        self.model, self.temperature = model, temperature
        self.stop = torch.tensor(list(stop_token_ids), device=device)
        self.step, self.place = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.ids, self.position = (torch.zeros(n_rows, 1, dtype=torch.long, device=device) for _ in range(2))
        self.mask = torch.zeros(n_rows, 1, 1, _length(rows, uniform), dtype=dtype, device=device)
        self.cache = fixed_cache.fixed_cache(rows.cache, n_rows, self.mask.shape[-1], self.place)
        self.uniform, self.logps = torch.zeros_like(uniform), torch.zeros_like(uniform)
        self.out = torch.zeros(uniform.shape, dtype=torch.long, device=device)
        self.unfinished = torch.zeros(n_rows, dtype=torch.bool, device=device)
        self.advance = self.compute_step

    def fits(self, rows: Rows, uniform: torch.Tensor) -> bool:
        """Whether these rows have room here. They may be fewer."""
        return uniform.shape[0] <= self.uniform.shape[0] and _length(rows, uniform) == self.mask.shape[-1]

    def start(self, rows: Rows, uniform: torch.Tensor) -> None:
        """Make the rows this batch. Copies of the first one, which count as ended, take the places that are left."""
        assert rows.cache is not None
        n, width = len(uniform), rows.width
        chosen = torch.zeros(len(self.uniform), dtype=torch.long, device=uniform.device)
        chosen[:n] = rows.copies
        fixed_cache.fill(self.cache, rows.cache, chosen, width - 1)
        self.ids.copy_(rows.ids[chosen, -1:])
        self.position.copy_(rows.position[chosen, -1:])
        self.mask.fill_(torch.finfo(self.mask.dtype).min)
        self.mask[:, 0, 0, :width].masked_fill_(rows.mask[chosen] == 1, 0.0)
        self.uniform[:n] = uniform
        self.unfinished.copy_(torch.arange(len(chosen), device=uniform.device) < n)
        self.step.zero_()
        self.place.fill_(width - 1)  # the prompts' last token is the first that is fed

    def compute_step(self) -> None:
        """Feed each row's last token, and draw its next one."""
        logits = self._next_logits()
        uniform = self.uniform.index_select(1, self.step).squeeze(1)
        token, logp = draw(logits, uniform, self.temperature)
        self.out.index_copy_(1, self.step, token[:, None])
        self.logps.index_copy_(1, self.step, logp[:, None])
        self.unfinished &= (token[:, None] != self.stop).all(1)
        self.ids.copy_(token[:, None])
        for counter in (self.position, self.place, self.step):
            counter += 1

    def _next_logits(self) -> torch.Tensor:
        self.mask.index_fill_(3, self.place, 0.0)
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def difference(self, rows: Rows, uniform: torch.Tensor) -> float:
        """The largest total variation between a row's distribution here and in ``rows``, of the first token."""
        self.start(rows, uniform)
        here = self._next_logits()[: len(uniform)].softmax(-1, dtype=torch.float32)
        there = rows.logits[rows.copies].softmax(-1, dtype=torch.float32)
        return float((here - there).abs().sum(-1).max()) / 2

    def capture(self, rows: Rows, uniform: torch.Tensor) -> float:
        """From here on a step is the replay of a graph. Returns the share of the first tokens that stay the same."""
        expected = self._first_tokens(rows, uniform)
        self.advance = fixed_cache.captured(self.compute_step)
        return float((self._first_tokens(rows, uniform) == expected).float().mean())

    def _first_tokens(self, rows: Rows, uniform: torch.Tensor) -> torch.Tensor:
        """[R, 4] of each response, since each step has to find what the one before it wrote."""
        self.start(rows, uniform)
        self.out.fill_(-1)  # nothing that was drawn before counts
        for _ in range(4):
            self.advance()
        return self.out[:, :4].clone()

    def decode(self, rows: Rows, uniform: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        """As :func:`decode`, of rows that fit."""
        self.start(rows, uniform)
        for step in range(1, uniform.shape[1] + 1):
            self.advance()
            if step % look_every(uniform.device) == 0 and not bool(self.unfinished.any()):
                break
        n = len(uniform)
        return list(zip(self.out[:n].tolist(), self.logps[:n].tolist(), strict=True))
