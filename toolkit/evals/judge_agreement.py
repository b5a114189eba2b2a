"""How far judges agree with each other, and with a reference judge such as gold or people.

Judges rate comparisons: two policies on one prompt. A judge's verdict is a win, a tie or a loss by the mean of its
preferences over orders, seeds and samples. Intervals resample prompts with all their comparisons.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from toolkit.errors import DataError, nearest
from toolkit.evals.agreement import EstimateDict, cohen_kappa, estimate_dict, krippendorff_alpha
from toolkit.evals.intervals import BootstrapOptions, Floats, bootstrap_statistic, ratio, sums_by_prompt
from toolkit.evals.winrate import exact_ties

Unit = tuple[str, tuple[str, str]]
"""A comparison: the prompt's id and the two policies."""


@dataclass(frozen=True)
class Opinion:
    """One judgement. ``preference`` in [0, 1] is for the first policy; ``order`` is the order of presentation.

    ``half``: the judge failed on the same pair in the other order. Such an opinion counts in ``by_order`` alone: in
    one order the judge's taste for a place counts as its preference.
    """

    prompt_id: str
    policies: tuple[str, str]
    judge: str
    preference: float
    order: int | None = None
    half: bool = False


@dataclass(frozen=True)
class PairAgreement:
    """Two judges over the ``n`` comparisons that both judged: the share of equal verdicts, and Cohen's kappa."""

    judges: tuple[str, str]
    same_verdict: EstimateDict
    cohen_kappa: EstimateDict
    n: int


@dataclass(frozen=True)
class Accuracy:
    """A judge against the reference.

    ``accuracy`` is over the ``n`` comparisons that the reference decides. Each judgement is right, wrong, or a tie that
    counts half, and judgements are averaged within a comparison. ``by_order`` is the same for the judgements in order 0
    and in order 1, None where there are none. ``same_verdict`` and ``cohen_kappa`` compare wins, ties and losses over
    the ``n_all`` comparisons that both judged.
    """

    judge: str
    accuracy: EstimateDict
    by_order: tuple[EstimateDict | None, EstimateDict | None]
    same_verdict: EstimateDict
    cohen_kappa: EstimateDict
    n: int
    n_all: int


@dataclass(frozen=True)
class JudgeAgreement:
    """``krippendorff_alpha`` (nominal) is over all judges but the reference. It is None for fewer than two judges."""

    judges: tuple[str, ...]
    reference: str | None
    pairs: tuple[PairAgreement, ...]
    krippendorff_alpha: EstimateDict | None
    against_reference: tuple[Accuracy, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def judge_agreement(
    opinions: Sequence[Opinion],
    *,
    reference: str | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> JudgeAgreement:
    """Agreement of all judges in ``opinions``; ``reference`` names the one that the others are measured against.

    Raises:
        DataError: a reference that judged nothing.
    """
    judges = list(dict.fromkeys(o.judge for o in opinions))
    if reference is not None and reference not in judges:
        raise DataError(f"judge {reference!r} judged nothing here", where="reference", fix=nearest(reference, judges))
    units = list(dict.fromkeys((o.prompt_id, o.policies) for o in opinions))
    position = {unit: k for k, unit in enumerate(units)}
    prompts_U = np.array([prompt for prompt, _ in units])
    opinions_of = {judge: [o for o in opinions if o.judge == judge] for judge in judges}
    whole = {judge: [o for o in of_judge if not o.half] for judge, of_judge in opinions_of.items()}
    verdicts = {judge: _verdicts(whole[judge], position) for judge in judges}
    others = [judge for judge in judges if judge != reference]
    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}

    def verdict_agreement(a: str, b: str) -> tuple[EstimateDict, EstimateDict, int]:
        both = ~np.isnan(verdicts[a]) & ~np.isnan(verdicts[b])
        x, y, prompts = verdicts[a][both], verdicts[b][both], prompts_U[both]
        columns = sums_by_prompt(prompts, x == y, np.ones(len(x)))
        same = bootstrap_statistic(columns, ratio, **options)
        kappa = cohen_kappa(x, y, prompt_ids=prompts.tolist(), **options)
        return estimate_dict(same), estimate_dict(kappa), len(x)

    pairs = []
    for a, b in combinations(others, 2):
        same, kappa, n = verdict_agreement(a, b)
        if n:
            pairs.append(PairAgreement((a, b), same, kappa, n))
    alpha = None
    if len(others) > 1:
        table_JU = np.array([verdicts[judge] for judge in others])
        alpha = estimate_dict(krippendorff_alpha(table_JU, unit_prompts=prompts_U.tolist(), **options))
    against = []
    for judge in others if reference is not None else []:
        same, kappa, n_all = verdict_agreement(judge, str(reference))
        truth = {unit: verdicts[str(reference)][k] for unit, k in position.items()}
        judged = opinions_of[judge]
        first, second = (_accuracy([o for o in judged if o.order == order], truth, options)[0] for order in (0, 1))
        overall, n = _accuracy(whole[judge], truth, options)
        if overall is not None:
            against.append(Accuracy(judge, overall, (first, second), same, kappa, n, n_all))
    return JudgeAgreement(tuple(judges), reference, tuple(pairs), alpha, tuple(against))


def _verdicts(opinions: Sequence[Opinion], position: dict[Unit, int]) -> Floats:
    """1, 0 or -1 for each comparison (U,), each order with the same weight. NaN where the judge did not judge it."""
    by_order: dict[int, dict[int | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for o in opinions:
        by_order[position[o.prompt_id, o.policies]][o.order].append(o.preference)
    out = np.full(len(position), np.nan)
    for unit, orders in by_order.items():
        out[unit] = np.mean([np.mean(v) for v in orders.values()])
    return np.sign(exact_ties(out) - 0.5)


def _accuracy(
    opinions: Sequence[Opinion], truth: dict[Unit, float], options: BootstrapOptions
) -> tuple[EstimateDict | None, int]:
    """Share of judgements that agree with the reference's verdicts, and the number of comparisons behind it."""
    right: dict[Unit, list[float]] = defaultdict(list)
    for o in opinions:
        side = truth[o.prompt_id, o.policies]
        if not np.isnan(side) and side != 0.0:
            right[o.prompt_id, o.policies].append((1.0 + side * np.sign(o.preference - 0.5)) / 2.0)
    if not right:
        return None, 0
    means = [float(np.mean(values)) for values in right.values()]
    columns = sums_by_prompt([prompt for prompt, _ in right], means, np.ones(len(means)))
    return estimate_dict(bootstrap_statistic(columns, ratio, **options)), len(means)
