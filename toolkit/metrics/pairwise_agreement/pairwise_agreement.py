"""Pairwise agreement of a reward with preferences, with an interval over prompts, as an `evaluate` module."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from toolkit.errors import DataError
from toolkit.evals.agreement import estimate_dict, pairwise_accuracy

_DESCRIPTION = """
Share of compared pairs whose preferred response gets the higher reward; equal rewards count half. This is the accuracy
of a reward model or of an implicit reward. The interval resamples prompts with all their pairs.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each pair, the reward of its first response minus the reward of its second.
    references: for each pair, the probability that the first response is preferred: 1, 0, 0.5 for a tie, or in between.
    prompt_ids: which prompt each pair belongs to; without them every pair is a prompt of its own.
    n_resamples, confidence, seed: options of the bootstrap.
Returns:
    accuracy (fraction of one), ci_low, ci_high, n (prompts), n_pairs.
Examples:
    >>> metric = evaluate.load("toolkit/metrics/pairwise_agreement")
    >>> metric.compute(predictions=[1.5, -0.2, 0.0, 0.3], references=[1.0, 1.0, 1.0, 1.0])["accuracy"]
    0.625
"""

_CITATION = """
@article{bradley1952rank, title={Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons},
  author={Bradley, Ralph Allan and Terry, Milton E.}, journal={Biometrika}, volume={39}, pages={324--345}, year={1952}}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PairwiseAgreement(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        prompt_ids: list[str] | None = None,
        n_resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        ids = [str(k) for k in range(len(predictions))] if prompt_ids is None else [str(k) for k in prompt_ids]
        if len(ids) != len(predictions):
            raise DataError(f"{len(ids)} prompt ids for {len(predictions)} pairs", where="pairwise_agreement")
        # each pair is an entry with the rewards (margin, 0); entries with equal ids are one prompt
        estimate = pairwise_accuracy(
            [(k, 0, 1, float(p), 1.0) for k, p in enumerate(references)],
            [[float(margin), 0.0] for margin in predictions],
            prompt_ids=ids,
            n_resamples=n_resamples,
            confidence=confidence,
            seed=seed,
        )
        result = estimate_dict(estimate)
        return {"accuracy": result.pop("value"), **result, "n_pairs": len(predictions)}
