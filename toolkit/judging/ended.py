"""The arms' win rate on the prompts where both of them ended their responses: without what truncation is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

from toolkit.evals.verdict import ARMS
from toolkit.evals.winrate import WinRate
from toolkit.judging.records import Judgement
from toolkit.judging.win_rates import IntervalOptions, pooled_win_rate, win_rates
from toolkit.preferences.samples import Sample

BOTH_ENDED = "both responses ended"


def prompts_that_both_ended(samples: Sequence[Sample]) -> set[str]:
    """Prompts on which no sample of either arm ran into the length limit."""
    of_arms = [sample for sample in samples if sample.policy in ARMS]
    return {sample.prompt_id for sample in of_arms} - {sample.prompt_id for sample in of_arms if sample.truncated}


def where_both_ended(
    judgements: Sequence[Judgement],
    samples: Sequence[Sample],
    deciding: Sequence[str],
    **intervals: Unpack[IntervalOptions],
) -> list[dict[str, Any]]:
    """The rows of RM + PPO against DPO on these prompts, one for each judge, with ``slice`` set.

    ``judgements`` have RM + PPO as the policy. Where several judges decide there is a row for all of them together.
    """
    ended = prompts_that_both_ended(samples)
    members = [j for j in judgements if (j.policy, j.baseline) == ARMS and j.prompt_id in ended]
    rows: list[WinRate] = win_rates(members, **intervals)
    pooled = pooled_win_rate(members, deciding, **intervals) if len(deciding) > 1 else None
    rows += [pooled] if pooled is not None else []
    return [replace(row, slice=BOTH_ENDED).as_dict() for row in rows]
