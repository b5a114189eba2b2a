"""What rollouts and updates leave in the log and in the table of completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from toolkit.preferences.rows import Prompt


@dataclass(frozen=True)
class CompletionRow:
    """One response for the table of completions. ``score`` has the rewards of its steps in it."""

    rollout: int
    prompt_id: str
    prompt: Prompt
    completion: str
    score: float
    kl_nats: float
    n_tokens: int
    truncated: bool


@dataclass(frozen=True)
class CriticSums:
    """One response's share of the critic's metrics: sums over its tokens, in fp64. ``error`` is the return minus the
    critic's value."""

    returns: float
    returns_squared: float
    error: float
    error_squared: float


@dataclass(frozen=True)
class ResponseSums:
    """One response's share of the metrics: sums over its tokens, in fp64.

    ``place``: its prompt's place in the rollout, and its number among the prompt's samples. ``sampler_difference`` is
    that between the log-probabilities under what sampled and under the training pass, without its sign. ``kl`` is to
    the policy that training started from, ``kl_averaged`` to an averaged reference, None where there is none.
    ``disagreement`` is None where no ensemble scores, ``critic`` where there is no critic.
    """

    place: tuple[int, int]
    n_tokens: int
    ended: float
    score: float
    score_shaped: float
    kl: float
    kl_k3: float
    kl_averaged: float | None
    entropy: float
    sampler_difference: float
    rlhf_reward: float
    disagreement: float | None
    critic: CriticSums | None


def summarise(responses: Sequence[ResponseSums]) -> dict[str, float]:
    """Metrics of a rollout, summed in the order of its places, so that they are the same for any number of processes.

    KL and entropy are in nats; ``objective/kl`` is per response, ``objective/entropy`` per token.
    """
    ordered = sorted(responses, key=lambda response: response.place)
    n_tokens = sum(response.n_tokens for response in ordered)

    def mean(values: list[float]) -> float:
        return float(sum(values) / len(values))

    spread = [r.disagreement for r in ordered if r.disagreement is not None]
    averaged = [r.kl_averaged for r in ordered if r.kl_averaged is not None]
    scores = torch.tensor([r.score for r in ordered], dtype=torch.float64)
    quantiles = torch.quantile(scores, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {
        "objective/kl": mean([r.kl for r in ordered]),
        "objective/kl_k3": mean([r.kl_k3 for r in ordered]),
        **({"objective/kl_averaged_reference": mean(averaged)} if averaged else {}),
        "objective/entropy": float(sum(r.entropy for r in ordered) / n_tokens),
        "objective/score": mean([r.score for r in ordered]),
        "objective/score_shaped": mean([r.score_shaped for r in ordered]),
        "objective/rlhf_reward": mean([r.rlhf_reward for r in ordered]),
        **{f"objective/score_q{q}": value for q, value in zip((10, 50, 90), quantiles, strict=True)},
        "sampling/logp_difference": mean([r.sampler_difference for r in ordered]),
        "sampling/logp_difference_max": max(r.sampler_difference for r in ordered),
        **({"objective/score_disagreement": mean(spread)} if spread else {}),
        **_critic_metrics([r.critic for r in ordered if r.critic is not None], n_tokens),
        "length/mean": mean([r.n_tokens for r in ordered]),
        "eos_rate": mean([r.ended for r in ordered]),
        "tokens": float(n_tokens),
    }


def _critic_metrics(responses: Sequence[CriticSums], n_tokens: int) -> dict[str, float]:
    """The share of the returns' variance that the critic explains; nothing without a critic."""
    if not responses:
        return {}

    def variance(sums: list[float], squares: list[float]) -> float:
        """Over the tokens of all responses, with Bessel's correction."""
        total = sum(sums)
        return float(sum(squares) - total * total / n_tokens) / max(n_tokens - 1, 1)

    returns = variance([r.returns for r in responses], [r.returns_squared for r in responses])
    errors = variance([r.error for r in responses], [r.error_squared for r in responses])
    return {"value/explained_variance": 1 - errors / max(returns, 1e-8)}


class MetricMeans:
    """Metrics since the last entry of the log, whose means are the next one. ``values``: by name, in their order."""

    def __init__(self, values: Mapping[str, list[float]] | None = None) -> None:
        self.values = defaultdict(list, values or {})

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.values[name].append(value)

    def take(self) -> dict[str, float]:
        """The means; what follows is averaged anew.

        >>> means = MetricMeans()
        >>> means.add({"objective/kl": 1.0, "tokens": 8})
        >>> means.add({"objective/kl": 2.0})
        >>> means.take(), means.take()
        ({'objective/kl': 1.5, 'tokens': 8.0}, {})
        """
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.values.clear()
        return means
