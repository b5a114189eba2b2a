"""The loss of fine-tuning on responses: their likelihood."""

from __future__ import annotations

import torch

from toolkit.engine.engine import Engine
from toolkit.training.batch import PairBatch


def completion_loss(engine: Engine, batch: PairBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The batch's mean negative log-likelihood of response tokens, in nats, and metrics. Prompt tokens do not count."""
    logps_N, _ = engine.token_logps(batch.trees)
    return -logps_N.mean() * batch.token_share, {"nll/token": -logps_N}
