"""Which judges of a run decide between the arms, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from toolkit.evals.broken import broken_judge
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.judge_tests import JudgeTest
from toolkit.evals.result_warnings import failing_judge
from toolkit.evals.verdict import ARMS, Judging
from toolkit.judging import win_rates
from toolkit.judging.independence import RunModels, dependence
from toolkit.judging.records import Judgement
from toolkit.recipe.schema import EvaluateSection

NO_REASONS: Mapping[str, str] = {}


def judging_of(
    judgements: Sequence[Judgement],
    judges: Sequence[str],
    tests: Mapping[str, JudgeTest],
    section: EvaluateSection,
    prompt_ids: Sequence[str],
    run: RunModels,
    bootstrap: BootstrapOptions,
    recorded: Mapping[str, str] = NO_REASONS,
) -> tuple[Judging, list[str]]:
    """How the verdict comes from the judges, and warnings about those that cannot decide.

    ``recorded`` gives further reasons against judges whose judgements come from files.
    """
    names = list(dict.fromkeys(j.judge for j in judgements))
    broken = broken_judges(judgements)
    # A file names judges of its own.
    dependent = dependence(list(dict.fromkeys([*judges, *names])), prompt_ids, run) | dict(recorded)
    judging = Judging(
        primary_judge=section.primary_judge,
        smallest_effect=section.smallest_effect,
        not_independent=dependent,
        demonstration=section.demonstration,
        n_prompts=len(prompt_ids),
        tests=tests,
        unverified=Counter(
            j.judge
            for j in judgements
            if {j.policy, j.baseline} == set(ARMS) and not (j.policy_hash and j.baseline_hash)
        ),
        broken_judges=broken,
    )
    deciding = [name for name in names if name not in judging.refused]
    pooled = win_rates.pooled_win_rate(judgements, deciding, **bootstrap)
    warnings = [
        f"judge {judge} is {reason}: it does not decide" for judge, reason in [*dependent.items(), *broken.items()]
    ]
    if section.primary_judge is not None and section.primary_judge not in deciding:
        warnings.append(f"the primary judge {section.primary_judge} did not judge, or may not decide")
    for name in names:
        failed = [j.preference is None for j in judgements if j.judge == name]
        warnings += failing_judge(name, sum(failed), len(failed))
    return replace(judging, pooled=pooled.as_dict() if pooled is not None else None), warnings


def broken_judges(judgements: Sequence[Judgement]) -> dict[str, str]:
    """Judge -> why its comparisons of the arms say nothing."""
    of_judge: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        if {judgement.policy, judgement.baseline} == set(ARMS):
            of_judge.setdefault(judgement.judge, []).append(judgement)
    reasons = {}
    for judge, of_arms in of_judge.items():
        n_equal = sum(bool(j.policy_hash) and j.policy_hash == j.baseline_hash for j in of_arms)
        reasons[judge] = broken_judge([j.preference for j in of_arms], n_equal)
    return {judge: reason for judge, reason in reasons.items() if reason}
