"""Win rates corrected for what is not quality: length, and length, lists, headers and bold type together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats
from toolkit.evals.length_control import LengthTable, length_controlled_win_rate
from toolkit.evals.style import FEATURES, style_controlled_win_rate
from toolkit.evals.winrate import WinRate, average_within_prompt
from toolkit.judging.records import Judgement

_log = logging.getLogger(__name__)

Alignment = Literal["alpaca_eval", "instruction"]


class IntervalOptions(TypedDict, total=False):
    """The keyword arguments of every statistic in ``evals`` that has an interval; all are optional."""

    n_resamples: int
    confidence: float
    seed: int


def recorded_fields(members: Sequence[Judgement], names: Sequence[str]) -> bool:
    fields = [f"{side}_{name}" for side in ("policy", "baseline") for name in names]
    return any(all(getattr(m, name) is not None for name in fields) for m in members)


def prompt_numbers(members: Sequence[Judgement]) -> NDArray[np.int64]:
    """The prompt of each judgement, as a number from 0 in order of first appearance."""
    number: dict[str, int] = {}
    of_member = (number.setdefault(m.prompt_id, len(number)) for m in members)
    return np.fromiter(of_member, dtype=np.int64, count=len(members))


def _by_prompt(members: Sequence[Judgement], prompts: NDArray[np.int64], name: str) -> Floats:
    """A field's mean over a prompt's judgements, (n,); NaN where none of them records it."""
    recorded = (getattr(m, name) for m in members)
    values = np.fromiter((np.nan if x is None else x for x in recorded), dtype=np.float64, count=len(members))
    return average_within_prompt(prompts, values)[1]


def with_style_control(
    row: WinRate, members: Sequence[Judgement], preferences: Floats, **intervals: Unpack[IntervalOptions]
) -> WinRate:
    prompts = prompt_numbers(members)
    policy_style, baseline_style = (
        np.stack([_by_prompt(members, prompts, f"{side}_{feature}") for feature in FEATURES], axis=1)
        for side in ("policy", "baseline")
    )
    if row.n_judged and np.isnan(policy_style + baseline_style).any(axis=1).all():
        raise DataError(
            f"no judgement of {row.policy!r} records the style of its responses",
            where="style control",
            fix="judge again, or record policy_length, _lists, _headers, _bold and baseline_length, ...",
        )
    result = style_controlled_win_rate(preferences, policy_style, baseline_style, **intervals)
    return replace(
        row,
        sc_win_rate=result.win_rate,
        sc_ci_low=result.ci_low,
        sc_ci_high=result.ci_high,
        style_effects=result.effects,
        sc_reason=result.reason,
    )


def with_length_control(
    row: WinRate,
    members: Sequence[Judgement],
    preferences: Floats,
    table: LengthTable | None,
    alignment: Alignment,
    **intervals: Unpack[IntervalOptions],
) -> WinRate:
    prompts = prompt_numbers(members)
    policy_lengths, baseline_lengths = (
        _by_prompt(members, prompts, f"{side}_length") for side in ("policy", "baseline")
    )
    usable = ~np.isnan(preferences) & ~np.isnan(policy_lengths) & ~np.isnan(baseline_lengths)
    if row.n_judged and not usable.any():
        raise DataError(
            f"no judgement of {row.policy!r} records lengths",
            where="length control",
            fix="record policy_length and baseline_length in characters, or leave length control out",
        )
    difficulty = None if table is None else _difficulties(members, table, alignment, row.policy)
    result = length_controlled_win_rate(
        preferences, policy_lengths, baseline_lengths, difficulty=difficulty, table=table, **intervals
    )
    return replace(
        row,
        lc_win_rate=result.lc_win_rate,
        lc_ci_low=result.ci_low,
        lc_ci_high=result.ci_high,
        lc_variant=result.variant,
        lc_reason=result.reason,
    )


def _difficulties(members: Sequence[Judgement], table: LengthTable, alignment: Alignment, policy: str) -> Floats:
    """Difficulty of each prompt, in order of first appearance."""
    prompts = list(dict.fromkeys(m.prompt_id for m in members))
    known = np.array([table.difficulty.get(prompt, np.nan) for prompt in prompts])
    size = len(table.difficulty_by_index)
    whole_file = all(m.alpaca_eval for m in members) and len(prompts) == len(members)
    if alignment == "alpaca_eval" and whole_file and 0.95 * size <= len(prompts) <= size:
        by_place = table.difficulty_by_index[: len(prompts)]
        moved = int(np.sum(~np.isnan(known) & (known != by_place)))
        if moved:
            _log.warning(
                "%s: %d of %d rows stand at another place than in the benchmark, and get another instruction's "
                "difficulty, as in AlpacaEval's published numbers; align by instruction for the corrected value",
                policy,
                moved,
                len(prompts),
            )
        return by_place
    if np.isnan(known).any():
        missing = int(np.isnan(known).sum())
        raise DataError(
            f"the length-control table does not know {missing} of {len(prompts)} prompts of {policy!r}",
            where=f"first unknown: {prompts[int(np.flatnonzero(np.isnan(known))[0])]}",
            fix="leave the table out: length control then uses lengths alone",
        )
    return known
