"""``off_policy``: how far the responses lie from what the model itself would write. It needs a forward pass."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from toolkit.engine.engine import Engine
from toolkit.engine.tree import TreeBatch
from toolkit.evals.intervals import bootstrap_mean
from toolkit.evals.winrate import average_within_prompt
from toolkit.evals.words import counted
from toolkit.measure.check.findings import Collector
from toolkit.measure.check.stored import CheckedRow
from toolkit.measure.check.tokens import Limits
from toolkit.models.encoding import text_encoder
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_policy
from toolkit.models.rendering import TemplateRefusesError
from toolkit.models.resolve import ModelRef
from toolkit.models.tokenizer import check_vocabulary
from toolkit.preferences.rows import canonical_prompt
from toolkit.recipe.training import ModelSection

# Nats per token that the responses are less likely than the model's own samples before that is worth a word.
WORTH_SAYING = 0.5


@dataclass(frozen=True)
class LikelihoodSample:
    """How many rows the forward pass reads, which, and in which precision."""

    n_rows: int
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


def check_likelihood(
    ref: ModelRef,
    tokenizer: Any,
    rows: Sequence[CheckedRow],
    sample: LikelihoodSample,
    limits: Limits,
    collector: Collector,
) -> None:
    """Compare each response's surprise with what the model expects of its own samples, in nats per token.

    The expected surprise of a sample is the entropy of the model's distribution: at each token of a response the
    difference of the two is zero in the mean for text that the model wrote, and above it for other text. A prompt
    counts once, with the mean of its rows; the interval is over prompts.
    """
    drawn = sorted(random.Random(sample.seed).sample(range(len(rows)), min(sample.n_rows, len(rows))))
    trees, scored = [], []
    for place in drawn:
        row = rows[place]
        encoder = text_encoder(tokenizer, row.prompt, ref.spec)
        try:
            tree = encoder.encode(row.prompt, row.responses, limits.max_response_tokens).tree
        except TemplateRefusesError:
            continue
        if 0 < len(tree.prompt_ids) <= limits.max_prompt_tokens:
            trees.append(tree)
            scored.append(row)
    if not trees:
        return
    model = load_policy(ref, ModelSection(dtype=sample.dtype))
    check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, ref.spec)
    engine = Engine(model.to(best_device()), int(tokenizer.pad_token_id), dtype=torch_dtype(sample.dtype))

    def surprises(batch: TreeBatch) -> list[tuple[float, float, int]]:
        logps_N, entropies_N = engine.token_logps(batch, with_entropy=True)
        lengths = torch.bincount(batch.owner, minlength=batch.n_responses).tolist()
        assert entropies_N is not None  # it was asked for
        sums = [
            [float(part.sum()) for part in torch.split(values.double().cpu(), lengths)]
            for values in (-logps_N, entropies_N)
        ]
        return list(zip(*sums, lengths, strict=True))

    totals = [np.array(values).sum(axis=0) for values in engine.map_responses(trees, surprises)]
    excess = [float((surprise - entropy) / n) for surprise, entropy, n in totals]
    surprise_mean = float(sum(total[0] for total in totals) / sum(total[2] for total in totals))
    estimate = bootstrap_mean(average_within_prompt([canonical_prompt(row.prompt) for row in scored], excess)[1])
    mean, low = estimate.value or 0.0, estimate.ci_low
    if mean < WORTH_SAYING or (low is not None and low <= 0.0):
        return
    interval = f" (95% interval {low:.2f} to {estimate.ci_high:.2f})" if low is not None else ""
    collector.add_all(
        "off_policy",
        [row.number for row, value in zip(scored, excess, strict=True) if value >= WORTH_SAYING],
        f"{mean:.2f} nats per token{interval} less likely than text that the model samples, in "
        f"{counted(len(scored), 'row')} drawn at random; the responses' surprise is {surprise_mean:.2f} nats per token",
    )
