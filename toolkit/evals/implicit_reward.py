"""The reward that a preference loss defines: the one that its policy was trained to give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Losses on the mean log-ratio per token: IPO (Azar et al. 2023, arXiv 2310.12036, as in TRL) and length-normalised DPO
# (Lambert et al. 2024, arXiv 2411.15124, section 5.1.2). The others sum over the response's tokens.
LENGTH_NORMALISED = ("ipo", "sigmoid_norm")


@dataclass(frozen=True)
class ImplicitReward:
    """``beta * log(pi / pi_ref)`` of a response: summed over its tokens, or their mean (``per_token``).

    >>> ImplicitReward(0.5)(-12.0, 6), ImplicitReward(0.5, per_token=True)(-12.0, 6)
    (-6.0, -1.0)
    """

    beta: float
    per_token: bool = False

    def __call__(self, log_ratio: float, n_tokens: int) -> float:
        """From the response's summed log-ratio in nats."""
        return self.beta * log_ratio / (n_tokens if self.per_token else 1)

    @property
    def words(self) -> str:
        """
        >>> ImplicitReward(0.1).words
        'beta * log(pi / pi_ref), summed over the tokens of the response, with beta = 0.1'
        """
        over = "its mean over the tokens" if self.per_token else "summed over the tokens"
        return f"beta * log(pi / pi_ref), {over} of the response, with beta = {self.beta:g}"


def defined_by(training_record: Mapping[str, Any], beta: float | None = None) -> ImplicitReward:
    """The reward of a policy by its training record (``beta``, ``loss_type``); another ``beta`` where one is given."""
    per_token = training_record.get("loss_type") in LENGTH_NORMALISED
    return ImplicitReward(float(training_record["beta"]) if beta is None else beta, per_token)
