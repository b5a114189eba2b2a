"""The engine: scores trees with one model, whatever their number and order.

``tree.py`` packs them, ``logps.py`` computes on a batch.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from toolkit.engine.distributed import map_batches
from toolkit.engine.fast.attention import takes_padding_map
from toolkit.engine.logps import at_temperature, branch_scores, by_response, from_logits, score_head, token_logps
from toolkit.engine.tree import Pieces, TreeBatch, batches, pack
from toolkit.errors import ModelError
from toolkit.models.encoding import Tree
from toolkit.models.inspect import attention_window, inner, is_encoder, learned_positions, other_layers, precision
from toolkit.models.sharding import placed

# Tokens of a forward pass by default. A CPU is fastest where a layer's activations stay in its cache.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 16_384}
# Tokens of a row at which attention costs as much as everything else. A tree is as wide as all its responses, and
# attention on a CPU computes the pairs of siblings only to mask them. A GPU's kernels have no such need.
ATTENTION_TOKENS = {"cpu": 1500}
# A wrong mask moves log-probabilities by nats; rounding moves a response's mean, or its score, by this much at most.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
# A token's log-probability, or a response's score, stays where only the tokens beside it in the tree change: they are
# hidden, and all products keep their shapes, so that a CPU rounds alike. A state that runs on moves it.
SIBLING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
# What models raise for a mask, a cache or an argument that they do not know, and torch for what a CUDA graph cannot
# hold.
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)

T = TypeVar("T")
_log = logging.getLogger(__name__)


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
        # The engine reads a linear score at a branch's last token; a model with another head (encoders) pools a row.
        self.pools_rows = self.classifier and not isinstance(score_head(model), nn.Linear)
        self.reads_pairs = self.pools_rows and is_encoder(inner(model).config)
        # What tells the texts of a pair apart in BERT's input.
        self.token_types = self.reads_pairs and (getattr(inner(model).config, "type_vocab_size", 0) or 0) > 1
        self.row_per_response: bool | None = True if self.pools_rows else None  # None until the probe has decided
        self.padding = True  # whether batches keep their padding
        self.probed = 0  # tokens of the longest tree probed
        self.takes_logits_to_keep = "logits_to_keep" in inspect.signature(inner(model).forward).parameters
        self.window, self.positions = attention_window(model), learned_positions(model)
        self.other_layers = other_layers(model)
        if self.pools_rows and inner(model).config.pad_token_id is None:
            inner(model).config.pad_token_id = pad_id  # the model's head may find a row's last token by it

    def shard(self) -> None:
        """Leave a shard of the model in each process. It computes inside :func:`toolkit.models.sharding.gathered`."""
        placed(self.model)
        self.device = next(self.model.parameters()).device

    def pack(self, trees: Sequence[Tree], *, last_tokens: bool | None = None) -> TreeBatch:
        """:func:`pack` in the layout that this model takes, on its device.

        By default with ``last_tokens`` where the model is a classifier, which reads its rewards there. Raises
        ModelError where a response goes beyond the model's last position.
        """
        self._decide_layout(trees)
        return pack(
            trees,
            self.pad_id,
            row_per_response=bool(self.row_per_response),
            padding=self.padding,
            last_tokens=self.classifier if last_tokens is None else last_tokens,
        ).to(self.device)

    def batches(
        self, trees: Sequence[Tree], token_budget: int | None = None, *, last_tokens: bool | None = None
    ) -> Iterator[list[int]]:
        """:func:`batches` for :meth:`pack`, by default within the engine's own token budget."""
        self._decide_layout(trees)
        return batches(
            trees,
            token_budget or self.token_budget,
            row_per_response=bool(self.row_per_response),
            last_tokens=self.classifier if last_tokens is None else last_tokens,
        )

    def _decide_layout(self, trees: Sequence[Tree]) -> None:
        """Whether the model takes these trees' mask. Raises ModelError where it has too few positions for them."""
        longest = widest = 0
        for tree in trees:  # once: they may wait on disk
            longest, widest = max(longest, tree.depth), max(widest, len(tree))
        if self.positions is not None and longest > self.positions:
            raise ModelError(
                f"a prompt with its response has {longest} tokens, and {type(inner(self.model)).__name__} has "
                f"{self.positions} positions",
                where="the longest of the data",
                fix="lower the limits of prompts and responses (max_prompt_tokens, max_response_tokens)",
            )
        if trees and not self.row_per_response:
            if self.other_layers is not None:
                # What they carry from one branch to the next may move too little for the probe to see in bf16.
                self._fall_back(f"it has {self.other_layers}")
            elif self.window is not None and longest > self.window:
                # The mask of a tree has no window, and what lies before it may move too little for the probe to see.
                self._fall_back(f"its attention has a window of {self.window} tokens, and a response ends at {longest}")
            elif widest > 1.5 * self.probed:  # another kind of limit may show in longer rows alone
                self.probe(trees)

    def _fall_back(self, why: str) -> None:
        self.row_per_response = True
        _log.warning(
            "%s does not take the tree mask (%s): responses are scored one row each, which is slower",
            type(inner(self.model)).__name__,
            why,
        )

    def adopt(self, batch: TreeBatch) -> TreeBatch:
        """A batch that another model's engine packed, packed anew where this model cannot take it."""
        self._decide_layout(batch.trees)
        tree_mask, without_padding = batch.attention_mask.dim() == 4, batch.padding_map is not None
        if (self.row_per_response and tree_mask) or (self.padding and without_padding):
            return self.pack(batch.trees, last_tokens=batch.last is not None)
        return batch

    @torch.no_grad()
    def probe(self, trees: Sequence[Tree]) -> None:
        """Compare the longest tree with its responses in rows of their own, which every model takes.

        The engine falls back to those rows, with a warning, where the tree's values differ or the model refuses it.
        """
        longest = max(trees, key=len)
        self.probed = len(longest)
        # One branch after another is enough to show a wrong mask, or a state that runs through the row; the last one
        # is as far from the prompt as any. A single response comes twice. The short tree brings padding.
        responses = [*longest.response_ids, longest.response_ids[0]][: max(2, len(longest.response_ids))]
        short = Tree(longest.prompt_ids[:1], [longest.response_ids[0][:1]])
        probes = [Tree(longest.prompt_ids, responses), short]
        with precision(self.device, self.dtype):
            expected = self._values_in_own_rows(probes)
            for padding in [False, True] if takes_padding_map(inner(self.model)) else [True]:
                self.padding = padding
                difference = self._probe_difference(probes, expected)
                self.row_per_response = difference is not None
                if difference is None:
                    return
        self._fall_back(str(difference))

    def _probe_difference(self, trees: Sequence[Tree], expected: torch.Tensor) -> str | None:
        """How the values of packed trees differ from the expected ones; None where they do not."""
        limit = PROBE_TOLERANCE[self.dtype]
        try:
            batch = pack(trees, self.pad_id, padding=self.padding)
            values = self._probe_values(batch)
            others = self._probe_values(pack(with_other_siblings(trees), self.pad_id, padding=self.padding))
        except REFUSALS as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        off = (expected - values).abs().cpu()
        # A response's mean, since a single token in hundreds may be off by more in bf16.
        mean = off if self.classifier else by_response(off, batch) / torch.bincount(batch.owner)
        largest = mean.max().item()
        if not largest <= limit:  # NaN is a difference
            return f"largest difference {largest:.2g}, limit {limit:g}"
        last = len(trees[0].response_ids) - 1
        of_last = torch.tensor([last]) if self.classifier else (batch.owner == last).nonzero().squeeze(1)
        moved, limit = (values - others).abs().cpu()[of_last].max().item(), SIBLING_TOLERANCE[self.dtype]
        return None if moved <= limit else f"other tokens beside a response move it by {moved:.2g}, limit {limit:g}"

    def _values_in_own_rows(self, trees: Sequence[Tree]) -> torch.Tensor:
        """What the model itself says of each response, few rows at a time: it may make all their logits."""
        singles = [Tree(tree.prompt_ids, [ids]) for tree in trees for ids in tree.response_ids]
        values_of: dict[int, torch.Tensor] = {}
        for indices in batches(singles, min(self.token_budget, TOKEN_BUDGET["cpu"]), row_per_response=True):
            batch = [singles[i] for i in indices]
            counts = [1 if self.classifier else len(tree.response_ids[0]) for tree in batch]
            values = self._probe_values(pack(batch, self.pad_id, row_per_response=True))
            values_of |= zip(indices, torch.split(values, counts), strict=True)
        return torch.cat([values_of[i] for i in range(len(singles))])

    def _probe_values(self, batch: TreeBatch) -> torch.Tensor:
        batch = batch.to(self.device)
        return self.branch_scores(batch) if self.classifier else self.token_logps(batch)[0]

    def token_logps(
        self, batch: TreeBatch, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N] log-probabilities and [N] entropies (nats), with gradients, under the caller's autocast."""
        if batch.attention_mask.dim() == 4:
            return token_logps(self.model, batch, temperature=temperature, with_entropy=with_entropy)
        width = batch.input_ids.shape[1]
        row, column = batch.predictor // width, batch.predictor % width
        # Logits of the prompts' own tokens are not needed, where the model can leave them out.
        first = {"logits_to_keep": width - int(column.min())} if self.takes_logits_to_keep else {}
        output = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False, **first
        )
        column = column - (width - output.logits.shape[1])
        logits = at_temperature(output.logits[row, column].float(), temperature)
        logps, entropies = from_logits(logits, batch.target, with_entropy)
        return logps, entropies if with_entropy else None

    def branch_scores(self, batch: TreeBatch) -> torch.Tensor:
        """[R] scalar rewards, or [R, M] of M heads, with gradients, under the caller's autocast."""
        if not self.pools_rows:
            # At the last token by its index: transformers would look for the last id that is not its configuration's
            # padding, which is often the EOS.
            return branch_scores(self.model, batch)
        types = {"token_type_ids": _second_texts(batch)} if self.token_types else {}
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), **types)
        scores: torch.Tensor = output.logits.squeeze(-1).float()
        return scores

    def logps(
        self, trees: Sequence[Tree], *, temperature: float = 1.0, advance: Callable[[int], None] | None = None
    ) -> list[list[torch.Tensor]]:
        """For every tree, for every response, its [n_tokens] fp32 log-probabilities on the CPU."""
        # Copies: a view that is sent to another process takes the whole batch with it.
        return self.map_logps(trees, lambda logps_n: logps_n.clone(), temperature=temperature, advance=advance)

    def map_logps(
        self,
        trees: Sequence[Tree],
        of_response: Callable[[torch.Tensor], T],
        *,
        temperature: float = 1.0,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[T]]:
        """For every tree, what ``of_response`` makes of each response's log-probabilities, as :meth:`logps` has them.

        Only what it returns is kept.
        """

        def compute(batch: TreeBatch) -> list[T]:
            logps_N, _ = self.token_logps(batch, temperature=temperature)
            lengths = torch.bincount(batch.owner, minlength=batch.n_responses).tolist()
            return [of_response(logps_n) for logps_n in torch.split(logps_N.cpu(), lengths)]

        return self.map_responses(trees, compute, advance)

    def outputs(
        self, trees: Sequence[Tree], *, advance: Callable[[int], None] | None = None
    ) -> list[list[list[float]]]:
        """For every tree, the outputs of each response: one for each head of the reward model."""

        def compute(batch: TreeBatch) -> list[list[float]]:
            outputs: list[list[float]] = self.branch_scores(batch).reshape(batch.n_responses, -1).tolist()
            return outputs

        return self.map_responses(trees, compute, advance)

    def scores(self, trees: Sequence[Tree], *, advance: Callable[[int], None] | None = None) -> list[list[float]]:
        """For every tree, the scalar reward of each response, under a model with one output."""
        return [[score for [score] in of_tree] for of_tree in self.outputs(trees, advance=advance)]

    def map_responses(
        self,
        trees: Sequence[Tree],
        compute: Callable[[TreeBatch], list[T]],
        advance: Callable[[int], None] | None = None,
        *,
        last_tokens: bool | None = None,
    ) -> list[list[T]]:
        """For every tree, in the caller's order, what ``compute`` gives for each of its responses, without gradients.

        ``compute`` gives a list with one value for each response of a batch. ``advance`` is told how many responses
        are done; ``last_tokens`` as in :meth:`pack`. Trees are asked for a batch at a time: they may wait on disk.
        """
        pieces = Pieces(trees, ATTENTION_TOKENS.get(self.device.type))

        def of_batch(indices: list[int]) -> list[T]:
            batch = self.pack([pieces[i] for i in indices], last_tokens=last_tokens)
            with torch.no_grad(), precision(self.device, self.dtype):
                return compute(batch)

        def done(values: list[T]) -> None:
            if advance is not None:
                advance(len(values))

        batches = list(self.batches(pieces, last_tokens=last_tokens))
        values_of: list[list[T]] = [[] for _ in range(len(pieces))]
        for indices, of_responses in zip(batches, map_batches(batches, of_batch, done), strict=True):
            values = iter(of_responses)
            for i in indices:
                values_of[i] = list(islice(values, pieces.n_responses[i]))
        out: list[list[T]] = [[] for _ in range(len(trees))]
        for index, values_in_order in zip(pieces.owner, values_of, strict=True):
            out[index] += values_in_order
        return out


def with_other_siblings(trees: Sequence[Tree]) -> list[Tree]:
    """The trees with other tokens of the first one in its responses, but for the last response."""
    first, *rest = trees
    ids = sorted({*first.prompt_ids, *(i for response in first.response_ids for i in response)})
    following = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
    *siblings, last = first.response_ids
    return [Tree(first.prompt_ids, [*([following[i] for i in response] for response in siblings), last]), *rest]


def _second_texts(batch: TreeBatch) -> torch.Tensor:
    """[R, T] 1 on the tokens of responses, 0 on those of prompts and on padding, in rows of one response each."""
    lengths = [(len(tree.prompt_ids), len(ids)) for tree in batch.trees for ids in tree.response_ids]
    prompt_R, response_R = torch.tensor(lengths, device=batch.input_ids.device).unbind(1)
    position_T = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    inside = (position_T >= prompt_R[:, None]) & (position_T < (prompt_R + response_R)[:, None])
    return inside.long()
