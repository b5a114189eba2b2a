"""The engine: scores trees with one model, whatever their number and order.

``tree.py`` packs them, ``logps.py`` computes on a batch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from toolkit.engine.fast.attention import takes_padding_map
from toolkit.engine.logps import branch_scores, by_response, from_logits, score_head, tempered, token_logps
from toolkit.engine.tree import TreeBatch, batches, pack, pieces
from toolkit.errors import ModelError
from toolkit.models.encoding import Tree
from toolkit.models.inspect import attention_window, inner, learned_positions, precision

# Tokens of a forward pass by default. A CPU is fastest where a layer's activations stay in its cache: 1024 scored
# 10 to 25% faster than 4096 (SmolLM2-135M in bf16, 2 cores).
TOKEN_BUDGET = {"cpu": 1024, "cuda": 16_384}
# Tokens of a row at which attention costs as much as everything else. A tree is as wide as all its responses, and
# attention computes the pairs of siblings only to mask them. On a CPU rows of 1,024 tokens scored 1.5 times slower a
# token than rows of 64 (SmolLM2-135M in bf16, 2 cores); kernels of a GPU have no such need.
ATTENTION_TOKENS = {"cpu": 1500}
# A wrong mask moves log-probabilities by nats; rounding moves a response's mean, or its score, by this much at most.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
# What models raise for a mask or an argument that they do not know.
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


class Engine:
    """Scores trees with one model, whatever their number and order, and gives results in the caller's order.

    ``model`` is a causal language model (log-probabilities) or a sequence classifier (rewards). Training uses
    :meth:`pack`, :meth:`token_logps` and :meth:`branch_scores`; evaluation uses :meth:`logps` and :meth:`scores`.
    """

    def __init__(self, model: Any, pad_id: int, *, dtype: torch.dtype, token_budget: int | None = None) -> None:
        self.model, self.pad_id, self.dtype = model, pad_id, dtype
        self.device = next(model.parameters()).device
        self.token_budget = token_budget or TOKEN_BUDGET[self.device.type]
        self.classifier = "SequenceClassification" in type(inner(model)).__name__
        # A linear score of the last state is what a tree can serve; other heads (encoders) take the model's own way.
        self.pools = self.classifier and not isinstance(score_head(model), nn.Linear)
        self.plain: bool | None = True if self.pools else None  # None until the probe
        self.padded = True  # whether batches keep their padding
        self.probed = 0  # tokens of the longest tree probed
        self.keeps_logits = "logits_to_keep" in inspect.signature(inner(model).forward).parameters
        self.window, self.positions = attention_window(model), learned_positions(model)
        if self.pools and inner(model).config.pad_token_id is None:
            inner(model).config.pad_token_id = pad_id  # a head of its own may find the last token by it

    def pack(self, trees: Sequence[Tree], *, ends: bool | None = None) -> TreeBatch:
        """:func:`pack` as this model takes it; by default with ``ends`` where it is a classifier, which needs them."""
        self._look(trees)
        ends = self.classifier if ends is None else ends
        return pack(trees, self.pad_id, plain=bool(self.plain), padded=self.padded, ends=ends).to(self.device)

    def batches(
        self, trees: Sequence[Tree], token_budget: int | None = None, *, ends: bool | None = None
    ) -> Iterator[list[int]]:
        """:func:`batches` of what this model takes, by default of the engine's own budget; ``ends`` as in `pack`."""
        self._look(trees)
        ends = self.classifier if ends is None else ends
        return batches(trees, token_budget or self.token_budget, plain=bool(self.plain), ends=ends)

    def _look(self, trees: Sequence[Tree]) -> None:
        """Whether these trees can be taken, and how. Raises ModelError where the model has not so many positions."""
        longest = max((tree.depth for tree in trees), default=0)
        if self.positions is not None and longest > self.positions:
            raise ModelError(
                f"a prompt with its response has {longest} tokens, and {type(inner(self.model)).__name__} has "
                f"{self.positions} positions",
                where="the longest of the data",
                fix="lower the limits of prompts and responses (max_prompt_tokens, max_response_tokens)",
            )
        if trees and not self.plain:
            if self.window is not None and longest > self.window:
                # The mask of a tree has no window, and what lies before it may move too little for the probe to see.
                self._fall_back(f"its attention has a window of {self.window} tokens, and a response ends at {longest}")
            elif max(map(len, trees)) > 1.5 * self.probed:  # a limit of another kind may bite in longer rows alone
                self.probe(trees)

    def _fall_back(self, why: str) -> None:
        self.plain = True
        warnings.warn(
            f"{type(inner(self.model)).__name__} does not take the tree mask ({why}): responses are scored one row "
            "each, which is slower",
            stacklevel=2,
        )

    def suited(self, batch: TreeBatch) -> TreeBatch:
        """A batch that another model's engine packed, packed anew where this model cannot take it."""
        self._look(batch.trees)
        unfit = (self.plain and batch.attention_mask.dim() == 4) or (self.padded and batch.padding_map is not None)
        return self.pack(batch.trees, ends=batch.last is not None) if unfit else batch

    @torch.no_grad()
    def probe(self, trees: Sequence[Tree]) -> None:
        """Compare the longest tree with the plain path; fall back, saying so, where they differ or it is refused."""
        tree = max(trees, key=len)
        self.probed = len(tree)
        # One branch behind another is enough for a wrong mask, or a state that runs through the row, to show; the last
        # one is as far from the prompt as any. A single response comes twice. The short tree brings padding.
        tree = Tree(tree.prompt_ids, [*tree.response_ids, tree.response_ids[0]][: max(2, len(tree.response_ids))])
        both = [tree, Tree(tree.prompt_ids[:1], [tree.response_ids[0][:1]])]
        limit = PROBE_TOLERANCE[self.dtype]
        with precision(self.device, self.dtype):
            expected = self._plain_values([Tree(tree.prompt_ids, [ids]) for tree in both for ids in tree.response_ids])
            for padded in [False, True] if takes_padding_map(inner(self.model)) else [True]:
                try:
                    batch = pack(both, self.pad_id, padded=padded)
                    off = (expected - self._probe_values(batch)).abs().cpu()
                    # A response's mean, since a single token in hundreds may be off by more in bf16.
                    mean = off if self.classifier else by_response(off, batch) / torch.bincount(batch.owner)
                    worst = mean.max().item()
                    why = f"largest difference {worst:.2g}, limit {limit:g}"
                except REFUSALS as error:
                    worst, why = float("nan"), f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self.plain, self.padded = not worst <= limit, padded  # NaN falls back as well
                if not self.plain:
                    return
        self._fall_back(why)

    def _plain_values(self, singles: Sequence[Tree]) -> torch.Tensor:
        """What the model itself says of trees with one response, few rows at a time: it may make all their logits."""
        found: dict[int, torch.Tensor] = {}
        for indices in batches(singles, min(self.token_budget, TOKEN_BUDGET["cpu"]), plain=True):
            chosen = [singles[i] for i in indices]
            counts = [1 if self.classifier else len(tree.response_ids[0]) for tree in chosen]
            values = self._probe_values(pack(chosen, self.pad_id, plain=True))
            found |= zip(indices, values.split(counts), strict=True)
        return torch.cat([found[i] for i in range(len(singles))])

    def _probe_values(self, batch: TreeBatch) -> torch.Tensor:
        batch = batch.to(self.device)
        return self.branch_scores(batch) if self.classifier else self.token_logps(batch)[0]

    def token_logps(
        self, batch: TreeBatch, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N] log-probabilities and [N] entropies, with gradients, under the caller's autocast."""
        if batch.attention_mask.dim() == 4:
            return token_logps(self.model, batch, temperature=temperature, with_entropy=with_entropy)
        width = batch.input_ids.shape[1]
        row, column = batch.predictor // width, batch.predictor % width
        # Logits of the prompts' own tokens are not needed, where the model can leave them out.
        kept = {"logits_to_keep": width - int(column.min())} if self.keeps_logits else {}
        output = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False, **kept
        )
        column = column - (width - output.logits.shape[1])
        logits = tempered(output.logits[row, column].float(), temperature)
        logps, entropies = from_logits(logits, batch.target, with_entropy)
        return logps, entropies if with_entropy else None

    def branch_scores(self, batch: TreeBatch) -> torch.Tensor:
        """[R] scalar rewards, with gradients, under the caller's autocast."""
        if not self.pools:
            # At the last token by its index: transformers would look for the last id that is not its configuration's
            # padding, which is often the EOS.
            return branch_scores(self.model, batch)
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
        return output.logits.squeeze(-1).float()

    def logps(
        self, trees: Sequence[Tree], *, temperature: float = 1.0, advance: Callable[[int], None] | None = None
    ) -> list[list[torch.Tensor]]:
        """For every tree, for every response, its [n_tokens] fp32 log-probabilities on the CPU."""

        def run(batch: TreeBatch) -> list[torch.Tensor]:
            logps_N, _ = self.token_logps(batch, temperature=temperature)
            return list(logps_N.cpu().split(torch.bincount(batch.owner, minlength=batch.n_responses).tolist()))

        return self.each(trees, run, advance)

    def scores(self, trees: Sequence[Tree], *, advance: Callable[[int], None] | None = None) -> list[list[float]]:
        """For every tree, the scalar reward of each response."""
        return self.each(trees, lambda batch: self.branch_scores(batch).tolist(), advance)

    def each(
        self,
        trees: Sequence[Tree],
        run: Callable[[TreeBatch], list[Any]],
        advance: Callable[[int], None] | None = None,
        *,
        ends: bool | None = None,
    ) -> list[list[Any]]:
        """What ``run`` gives for each response of a batch, for every tree in the caller's order, without gradients.

        ``advance`` is told how many responses are done; ``ends`` as in :meth:`pack`.
        """
        limit = ATTENTION_TOKENS.get(self.device.type)
        parts = [
            (index, piece) for index, tree in enumerate(trees) for piece in (pieces(tree, limit) if limit else [tree])
        ]
        results: list[list[Any]] = [[] for _ in parts]
        for indices in self.batches([piece for _, piece in parts], ends=ends):
            batch = self.pack([parts[i][1] for i in indices], ends=ends)
            with torch.no_grad(), precision(self.device, self.dtype):
                values = iter(run(batch))
            for i in indices:
                results[i] = [next(values) for _ in parts[i][1].response_ids]
            if advance is not None:
                advance(batch.n_responses)
        out: list[list[Any]] = [[] for _ in trees]
        for (index, _), values_of in zip(parts, results, strict=True):
            out[index] += values_of
        return out
