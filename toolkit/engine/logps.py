"""Log-probabilities and rewards on tree batches (``tree.py``): one prompt, K responses, each computed once.

The unembedding (or the score head) runs only on the positions that predict a response token (or give a reward). With
our own attention (``fast/attention.py``) the model sees no padding. A model that cannot take a tree's mask takes one
row per response; a numeric probe on first use decides (:class:`toolkit.engine.engine.Engine`).

Shapes: B rows, T tokens in a row, N response tokens in a batch, R responses in a batch, d hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.engine.fast.adapters import trained_copy
from toolkit.engine.tree import TreeBatch
from toolkit.models.inspect import backbone, inner

# Rows of logits that exist at once, which bounds the memory of a large vocabulary, and how many of them go through the
# log-softmax at once. On a CPU larger products are no faster, and the rows of a softmax should stay in the cache.
LOGIT_ROWS = {"cpu": 256, "cuda": 1024}
SOFTMAX_ROWS = {"cpu": 16, "cuda": 1024}


def hidden_states(model: Any, batch: TreeBatch) -> torch.Tensor:
    """[B * T, d] final hidden states of every position ([S, d] of a batch without padding)."""
    mask: torch.Tensor = batch.attention_mask
    if mask.dim() == 2:  # a row for each response, padded on the right: every model counts its positions itself
        inputs: dict[str, Any] = {"attention_mask": mask.long()}
    else:
        # Additive, in the precision of the products, so that no layer has to convert it.
        dtype = next(backbone(model).parameters()).dtype
        if torch.is_autocast_enabled(mask.device.type):
            dtype = torch.get_autocast_dtype(mask.device.type)
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
        inputs = {"attention_mask": mask, "position_ids": batch.position_ids}
        if batch.padding_map is not None:
            inputs["padding_map"] = batch.padding_map
    output = backbone(model)(input_ids=batch.input_ids, use_cache=False, **inputs)
    states: torch.Tensor = output.last_hidden_state
    return states.flatten(0, 1)


def scaled_logits(model: Any, products: torch.Tensor, temperature: float) -> torch.Tensor:
    """[..., V] fp32 logits from products with the unembedding.

    They are scaled and soft-capped as the model's configuration says, and divided by the temperature.
    """
    config = inner(model).config.get_text_config()
    logits = products.float()
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return at_temperature(logits, temperature)


def at_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1.0 else logits / temperature


def token_logps(
    model: Any, batch: TreeBatch, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[N] fp32 log-probabilities of the response tokens, and with ``with_entropy`` [N] entropies (nats, no gradient).

    Logits exist for at most ``LOGIT_ROWS`` positions at once, in training too.
    """
    states_Nd = hidden_states(model, batch)[batch.predictor]
    return state_logps(model, states_Nd, batch.target, temperature=temperature, with_entropy=with_entropy)


def state_logps(
    model: Any, states_Nd: torch.Tensor, target_N: torch.Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`token_logps` from [N, d], the states that the tokens are predicted from."""
    size = LOGIT_ROWS[states_Nd.device.type]
    training = torch.is_grad_enabled() and states_Nd.requires_grad
    head = inner(model).get_output_embeddings()
    frozen = not any(weight.requires_grad for weight in head.parameters())
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, states_Nd.shape[0], size):
        args = (states_Nd[start : start + size], target_N[start : start + size], model, temperature, with_entropy)
        if training and frozen:
            parts.append(_FrozenHead.apply(*args))  # type: ignore[no-untyped-call]
        elif training and states_Nd.shape[0] > size:
            parts.append(checkpoint(_chunk_logps, *args, use_reentrant=False))
        else:
            parts.append(_chunk_logps(*args))
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def _chunk_logps(
    states: torch.Tensor, target: torch.Tensor, model: Any, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    products = inner(model).get_output_embeddings()(states)
    # With gradients the rows stay together: if they were split, the gradient of each part would have all rows.
    rows = len(products) if products.requires_grad else SOFTMAX_ROWS[products.device.type]
    return _joined(
        from_logits(scaled_logits(model, part, temperature), targets, with_entropy)
        for part, targets in zip(torch.split(products, rows), torch.split(target, rows), strict=True)
    )


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities under an unembedding that does not train.

    The gradient of a row's state is the gradient of its log-probability times one number from above. So the forward
    pass computes the former, and the backward pass needs neither the logits nor a second product.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, target: torch.Tensor, model: Any, temperature: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            state = states.detach().requires_grad_()
            products = inner(model).get_output_embeddings()(state)
            gradient = torch.empty_like(products)
            parts = []
            rows = SOFTMAX_ROWS[products.device.type]
            for part, targets, into in zip(
                *(torch.split(tensor, rows) for tensor in (products.detach(), target, gradient)), strict=True
            ):
                part = part.float().requires_grad_()
                logps, entropies = from_logits(scaled_logits(model, part, temperature), targets, with_entropy)
                into.copy_(torch.autograd.grad(logps.sum(), part)[0])
                parts.append((logps.detach(), entropies))
            ctx.save_for_backward(torch.autograd.grad(products, state, gradient)[0])
        logps, entropies = _joined(parts)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, from_logps: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None, None]:
        [gradient] = ctx.saved_tensors
        return (from_logps[:, None] * gradient).to(gradient.dtype), None, None, None, None


def from_logits(logits: torch.Tensor, target: torch.Tensor, with_entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
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
    """[R] fp32 scalar rewards, or [R, M] of M heads, read at each response's last token. The head runs in fp32."""
    head = score_head(model)
    assert head is not None and batch.last is not None
    return apply_head(head, hidden_states(model, batch)[batch.last])


def score_head(model: Any) -> nn.Module | None:
    """The module ``score`` of a sequence classifier, from its adapter where that has one; None for other models."""
    head = dict(inner(model).named_children()).get("score")
    return trained_copy(head) if head is not None else None


def apply_head(head: Any, states: torch.Tensor) -> torch.Tensor:
    """[...] outputs of a scalar linear head in fp32, or [..., M] of M: small differences of large sums."""
    with torch.autocast(states.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(states.float(), head.weight.float(), bias).squeeze(-1)


def by_response(values_N: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """[R] sums of per-token values over each response."""
    total = torch.zeros(batch.n_responses, dtype=values_N.dtype, device=values_N.device)
    return total.index_add(0, batch.owner, values_N)
