"""Log-probabilities and rewards on tree batches (``tree_batch.py``): one prompt, K responses, each computed once.

The unembedding (or the score head) runs on the positions that matter alone. Where the attention is our own
(``attention.py``) the model sees no padding. A model that cannot take a tree's mask takes one row per response; a
numeric probe on first use decides (:class:`Engine`).

Shapes: B rows, T tokens in a row, N response tokens in a batch, R responses in a batch, d hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit import models
from toolkit.attention import GROUPED
from toolkit.errors import ModelError
from toolkit.models import backbone, inner
from toolkit.tree_batch import Tree, TreeBatch, batches, pack, pieces

# Rows of the unembedding product that exist at once (1024 x 49,152 in fp32 are 200 MB), and of them those whose
# log-softmax is taken at once. On a CPU products of 256 rows are as fast as any, and 16 rows of logits stay in the
# cache: 360 rows of SmolLM2 took 69 ms instead of 123, 62 of them for the product (bf16, 2 cores).
LOGIT_ROWS = {"cpu": 256, "cuda": 1024}
SOFTMAX_ROWS = {"cpu": 16, "cuda": 1024}
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


# ---------------------------------------------------------------- forward passes


def hidden_states(model: Any, batch: TreeBatch) -> torch.Tensor:
    """[B * T, d] final hidden states of every position ([S, d] of a batch without padding)."""
    mask: torch.Tensor = batch.attention_mask
    if mask.dim() == 2:  # a row each, padded on the right: positions count from its start, as every model does itself
        inputs: dict[str, Any] = {"attention_mask": mask.long()}
    else:
        # Additive, in the precision of the products, so that no layer has to convert it.
        dtype = next(backbone(model).parameters()).dtype
        if torch.is_autocast_enabled(mask.device.type):
            dtype = torch.get_autocast_dtype(mask.device.type)
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
        inputs = {"attention_mask": mask, "position_ids": batch.position_ids}
        if batch.rows is not None:
            inputs["tree_rows"] = batch.rows
    output = backbone(model)(input_ids=batch.input_ids, use_cache=False, **inputs)
    return output.last_hidden_state.flatten(0, 1)


def finished(model: Any, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """fp32 logits from products with the unembedding: the scaling and soft-capping that some models have, and the
    temperature."""
    config = inner(model).config.get_text_config()
    logits = logits.float()
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return _tempered(logits, temperature)


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1.0 else logits / temperature


def token_logps(
    model: Any, batch: TreeBatch, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[N] fp32 log-probabilities of the response tokens, and [N] entropies (nats, without gradient) if asked for.

    Logits exist for at most ``LOGIT_ROWS`` positions at once, in training too.
    """
    states_Nd = hidden_states(model, batch)[batch.predictor]
    return state_logps(model, states_Nd, batch.target, temperature=temperature, with_entropy=with_entropy)


def state_logps(
    model: Any, states_Nd: torch.Tensor, target_N: torch.Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`token_logps` from the states that the tokens are predicted from, [N, d]."""
    size = LOGIT_ROWS[states_Nd.device.type]
    training = torch.is_grad_enabled() and states_Nd.requires_grad
    head = inner(model).get_output_embeddings()
    frozen = not any(weight.requires_grad for weight in head.parameters())
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, states_Nd.shape[0], size):
        args = (states_Nd[start : start + size], target_N[start : start + size], model, temperature, with_entropy)
        if training and frozen:
            parts.append(_FrozenHead.apply(*args))
        elif training and states_Nd.shape[0] > size:
            parts.append(checkpoint(_chunk, *args, use_reentrant=False))
        else:
            parts.append(_chunk(*args))
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def _chunk(
    states: torch.Tensor, target: torch.Tensor, model: Any, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    products = inner(model).get_output_embeddings()(states)
    # With gradients the rows stay together: taken apart, each part's gradient would be a tensor of all rows.
    rows = len(products) if products.requires_grad else SOFTMAX_ROWS[products.device.type]
    return _joined(
        _from_logits(finished(model, part, temperature), targets, with_entropy)
        for part, targets in zip(products.split(rows), target.split(rows), strict=True)
    )


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities under an unembedding that does not train.

    A row's gradient with respect to its state is its log-probability's, times what comes from above. So the forward
    pass computes the first, and neither logits nor a second product are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, target: torch.Tensor, model: Any, temperature: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            state = states.detach().requires_grad_()
            products = inner(model).get_output_embeddings()(state)
            gradient = torch.empty_like(products)
            found = []
            rows = SOFTMAX_ROWS[products.device.type]
            for part, targets, into in zip(
                products.detach().split(rows), target.split(rows), gradient.split(rows), strict=True
            ):
                part = part.float().requires_grad_()
                logps, entropies = _from_logits(finished(model, part, temperature), targets, with_entropy)
                into.copy_(torch.autograd.grad(logps.sum(), part)[0])
                found.append((logps.detach(), entropies))
            ctx.save_for_backward(torch.autograd.grad(products, state, gradient)[0])
        logps, entropies = _joined(found)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, from_logps: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None, None]:
        [gradient] = ctx.saved_tensors
        return (from_logps[:, None] * gradient).to(gradient.dtype), None, None, None, None


def _from_logits(logits: torch.Tensor, target: torch.Tensor, with_entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (zeros where not asked for)."""
    logps = -F.cross_entropy(logits, target, reduction="none")
    if not with_entropy:
        return logps, torch.zeros_like(logps)
    with torch.no_grad():
        log_p = logits.detach().log_softmax(-1)
        return logps, -(log_p.exp() * log_p).sum(-1)


def _joined(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def branch_scores(model: Any, batch: TreeBatch) -> torch.Tensor:
    """[R] fp32 scalar rewards, read at each response's last token; the head runs in fp32, whatever autocast is on."""
    assert batch.last is not None
    return apply_head(score_head(model), hidden_states(model, batch)[batch.last])


def score_head(model: Any) -> nn.Module | None:
    """The module ``score`` of a sequence classifier, the trained one where an adapter brings its own."""
    head = dict(inner(model).named_children()).get("score")
    return head.modules_to_save[head.active_adapter] if isinstance(head, ModulesToSaveWrapper) else head


def apply_head(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """[...] outputs of a scalar head in fp32: values and rewards are small differences of large sums."""
    with torch.autocast(states.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(states.float(), head.weight.float(), bias).squeeze(-1)


def by_response(values_N: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """[R] sums of per-token values over each response."""
    total = torch.zeros(batch.n_responses, dtype=values_N.dtype, device=values_N.device)
    return total.index_add(0, batch.owner, values_N)


# ---------------------------------------------------------------- the engine


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
        self.window, self.positions = models.attention_window(model), models.learned_positions(model)
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
        unfit = (self.plain and batch.attention_mask.dim() == 4) or (self.padded and batch.rows is not None)
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
        own_attention = inner(self.model).config.get_text_config()._attn_implementation == GROUPED
        with models.precision(self.device, self.dtype):
            expected = self._plain_values([Tree(tree.prompt_ids, [ids]) for tree in both for ids in tree.response_ids])
            for padded in [False, True] if own_attention else [True]:
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
        logits = _tempered(output.logits[row, column].float(), temperature)
        logps, entropies = _from_logits(logits, batch.target, with_entropy)
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
            with torch.no_grad(), models.precision(self.device, self.dtype):
                values = iter(run(batch))
            for i in indices:
                results[i] = [next(values) for _ in parts[i][1].response_ids]
            if advance is not None:
                advance(batch.n_responses)
        out: list[list[Any]] = [[] for _ in trees]
        for (index, _), values_of in zip(parts, results, strict=True):
            out[index] += values_of
        return out
