"""The arms' win rate on the pairs in which both of them ended their responses: without what truncation is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

from toolkit.evals.verdict import ARMS
from toolkit.evals.winrate import WinRate
from toolkit.judging.controls import IntervalOptions
from toolkit.judging.records import Judgement, response_hash
from toolkit.judging.win_rates import pooled_win_rate, win_rates
from toolkit.preferences.samples import Sample

BOTH_ENDED = "both responses ended"


def prompts_that_both_ended(samples: Sequence[Sample]) -> set[str]:
    """Prompts on which no sample of either arm ran into the length limit."""
    of_arms = [sample for sample in samples if sample.policy in ARMS]
    return {sample.prompt_id for sample in of_arms} - {sample.prompt_id for sample in of_arms if sample.truncated}


def both_ended(judgements: Sequence[Judgement], samples: Sequence[Sample]) -> list[Judgement]:
    """The judgements of two responses that both ended, told by the responses' hashes.

    A judgement without hashes counts where no sample of its prompt ran into the length limit.
    """
    whole_prompts = prompts_that_both_ended(samples)
    cut = {(s.prompt_id, s.policy, response_hash(s.response)) for s in samples if s.truncated and s.policy in ARMS}
    judged_prompts = {s.prompt_id for s in samples if s.policy in ARMS}
    return [
        j
        for j in judgements
        if j.prompt_id in whole_prompts
        or (
            j.prompt_id in judged_prompts
            and bool(j.policy_hash and j.baseline_hash)
            and (j.prompt_id, j.policy, j.policy_hash) not in cut
            and (j.prompt_id, j.baseline, j.baseline_hash) not in cut
        )
    ]


def where_both_ended(
    judgements: Sequence[Judgement],
    samples: Sequence[Sample],
    deciding: Sequence[str],
    **intervals: Unpack[IntervalOptions],
) -> list[dict[str, Any]]:
    """The rows of RM + PPO against DPO on these pairs, one for each judge, with ``slice`` set.

    A prompt counts with the pairs that are left. ``judgements`` have RM + PPO as the policy. Where several judges
    decide there is a row for all of them together.
    """
    members = both_ended([j for j in judgements if (j.policy, j.baseline) == ARMS], samples)
    rows: list[WinRate] = win_rates(members, **intervals)
    pooled = pooled_win_rate(members, deciding, **intervals) if len(deciding) > 1 else None
    rows += [pooled] if pooled is not None else []
    return [replace(row, slice=BOTH_ENDED).as_dict() for row in rows]
