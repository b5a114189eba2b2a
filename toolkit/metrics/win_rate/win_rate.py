"""Win rate of one policy over another, with an interval over prompts, as an `evaluate` module."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from toolkit.evals.winrate import average_within_prompt
from toolkit.evals.winrate import win_rate as compute_win_rate

_DESCRIPTION = """
Win rate of a policy over a baseline from paired preferences, with the prompt as the unit. Preferences of one prompt
(both orders of presentation, several judges or samples) are averaged first, and the interval resamples prompts.
"""

_KWARGS_DESCRIPTION = """
Args:
    preferences: floats in [0, 1]: 1 where the policy is preferred, 0 where the baseline is, 0.5 for a tie, None
        or NaN where the judgement failed.
    prompt_ids: which prompt each preference belongs to; without them every preference is a prompt of its own.
    n_resamples, confidence, seed: options of the bootstrap.
Returns:
    win_rate, win, tie, loss (fractions of one), standard_error, ci_low, ci_high, p_value, n_prompts, n_judged, n_failed
    and the other fields of toolkit.evals.winrate.WinRate.
Examples:
    >>> metric = evaluate.load("toolkit/metrics/win_rate")
    >>> metric.compute(preferences=[1.0, 1.0, 0.5, 0.0])["win_rate"]
    0.625
"""

_CITATION = """
@article{efron1987better, title={Better Bootstrap Confidence Intervals}, author={Efron, Bradley},
  journal={Journal of the American Statistical Association}, volume={82}, number={397}, pages={171--185}, year={1987}}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class WinRate(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"preferences": datasets.Value("float64")}),
        )

    def _compute(
        self,
        preferences: list[float | None],
        prompt_ids: list[str] | None = None,
        policy: str = "policy",
        baseline: str = "baseline",
        judge: str = "judge",
        n_resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        values = [float("nan") if p is None else float(p) for p in preferences]
        n_failed = sum(p != p for p in values)
        ids = list(range(len(values))) if prompt_ids is None else prompt_ids
        return compute_win_rate(
            average_within_prompt(ids, values)[1],
            policy=policy,
            baseline=baseline,
            judge=judge,
            n_failed=n_failed,
            n_resamples=n_resamples,
            confidence=confidence,
            seed=seed,
        ).as_dict()
