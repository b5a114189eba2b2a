"""What recorded judgements say: win rates, and what goes with them.

The statistics are those of ``evals/``; here judgements are grouped, averaged inside prompts, and handed to them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats
from toolkit.evals.judge_agreement import Opinion, judge_agreement
from toolkit.evals.length_control import LengthTable, length_controlled_win_rate, load_length_table
from toolkit.evals.style import FEATURES, style_controlled_win_rate
from toolkit.evals.winrate import WinRate, average_within_prompt, bradley_terry, holm, win_rate
from toolkit.judging.records import Judgement, read_attributes, read_judgements

_log = logging.getLogger(__name__)

Alignment = Literal["alpaca_eval", "instruction"]
POOLED = "all judges"
_MOST_GROUPS = 50  # more are no slices: somebody named an identifier


def winrate_report(
    files: Sequence[str | Path],
    *,
    length_control: bool = False,
    style_control: bool = False,
    lc_table: str | Path | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    alignment: Alignment = "alpaca_eval",
    by: str | None = None,
    attributes: str | Path | None = None,
    pool_judges: bool = False,
    ranking: bool = False,
    reference: str | None = None,
) -> dict[str, Any]:
    """:func:`report` of recorded judgements: a win rate for each (policy, baseline, judge) in ``files``, in order of
    first appearance, and what goes with it.

    ``lc_table`` (a folder) implies ``length_control``. ``alignment`` says how a row of an AlpacaEval file finds its
    instruction's difficulty: "alpaca_eval" by its place in the file, as the published numbers do, even where an earlier
    instruction is missing and shifts the rest; "instruction" by the instruction itself. Other files, and files that
    hold too little of the benchmark, go by the instruction (``prompt_id`` = AlpacaEval's instruction id).

    ``by`` adds rows for each value of a prompt's attribute: a column of ``files``, or of ``attributes``, a file of
    prompts.

    Raises:
        DataError: as :func:`read_judgements`; length control without recorded lengths, style control without recorded
            styles, a table that does not know the instructions, or an attribute that is missing or takes more than 50
            values.
    """
    table = load_length_table(lc_table) if lc_table is not None else None
    judgements = read_judgements(files, by=by if attributes is None else None)
    if by is not None and attributes is not None:
        values = read_attributes(attributes, by)
        unknown = next((j.prompt_id for j in judgements if j.prompt_id not in values), None)
        if unknown is not None:
            fix = "give the file of prompts that were judged"
            raise DataError(f"no {by} for prompt {unknown}", where=str(attributes), fix=fix)
        judgements = [replace(j, group=values[j.prompt_id]) for j in judgements]
    return report(
        judgements,
        by=by,
        pool_judges=pool_judges,
        ranking=ranking,
        reference=reference,
        length_control=length_control or table is not None,
        style_control=style_control,
        table=table,
        n_resamples=n_resamples,
        confidence=confidence,
        seed=seed,
        alignment=alignment,
    )


def report(
    judgements: Sequence[Judgement],
    *,
    by: str | None = None,
    pool_judges: bool = False,
    ranking: bool = True,
    reference: str | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """``{"win_rates": [...], "bradley_terry": [...], "judge_agreement": {...} or None}``, in plain JSON values.

    ``bradley_terry`` has a row for each judge that compared three or more policies, unless ``ranking`` is off;
    ``judge_agreement`` is there for two or more judges, against ``reference``, or else against ``gold`` where it is one
    of them. ``pool_judges`` adds win rates of all judges together, averaged inside each prompt; ``by`` those of the
    judgements' groups. ``more``: as :func:`win_rates`.
    """
    bootstrap: dict[str, Any] = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    several = len({j.judge for j in judgements}) > 1
    together = [*judgements]
    if pool_judges and several:
        together += [replace(j, judge=POOLED, source=j.judge) for j in judgements]
    rows = win_rates(together, **bootstrap, **more)
    if by is not None:
        groups = sorted({j.group for j in judgements})
        if len(groups) > _MOST_GROUPS:
            raise DataError(f"{by!r} takes {len(groups)} values", where="slices", fix="name an attribute with few")
        if more.get("table") is not None:  # AlpacaEval's regression is fitted on the whole benchmark
            more = {**more, "table": None, "length_control": False}
        sliced = []
        for group in groups:
            part = win_rates([j for j in together if j.group == group], **bootstrap, **more)
            sliced += [replace(row, slice=f"{by}={group}") for row in part]
        rows += _with_holm(sliced)
    agreement = None
    if several:
        names = {j.judge for j in judgements}
        agreement = agreement_of(judgements, reference or ("gold" if "gold" in names else None), **bootstrap)
    return {
        "win_rates": [row.as_dict() for row in rows],
        "bradley_terry": rankings(judgements, **bootstrap) if ranking else [],
        "judge_agreement": agreement,
    }


def rankings(judgements: Sequence[Judgement], **bootstrap: Any) -> list[dict[str, Any]]:
    """Bradley-Terry strengths by judge, the strongest policy first, for judges that compared three or more."""
    by_judge: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        by_judge[judgement.judge].append(judgement)
    out = []
    for judge, members in by_judge.items():
        if len({name for m in members for name in (m.policy, m.baseline)}) < 3 or not any(
            m.preference is not None for m in members
        ):
            continue
        # one row for each comparison: its orders, seeds and samples are averaged first
        comparisons = list(dict.fromkeys((m.prompt_id, m.policy, m.baseline) for m in members))
        number = {key: k for k, key in enumerate(comparisons)}
        ids = [number[m.prompt_id, m.policy, m.baseline] for m in members]
        values = np.array([np.nan if m.preference is None else m.preference for m in members])
        orders = [m.order for m in members]
        _, preferences = average_within_prompt(ids, _balance_orders(ids, orders, values))
        fit = bradley_terry(
            [prompt for prompt, _, _ in comparisons],
            [policy for _, policy, _ in comparisons],
            [baseline for _, _, baseline in comparisons],
            preferences,
            **bootstrap,
        )
        names = ("policy", "log_strength", "ci_low", "ci_high", "win_rate")
        columns = (fit.policies, fit.log_strength, fit.ci_low, fit.ci_high, fit.win_rate)
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        rows.sort(key=lambda row: -(row["log_strength"] or 0.0))  # without a maximum all of them are None
        n_failed = int(np.isnan(values).sum())
        n_tied = int(np.sum(preferences == 0.5))
        out.append(
            {"judge": judge, "policies": rows, "n_prompts": fit.n, "n_judged": int(np.sum(~np.isnan(preferences)))}
            | {"n_failed": n_failed, "n_tied": n_tied}
        )
    return out


def agreement_of(judgements: Sequence[Judgement], reference: str | None, **bootstrap: Any) -> dict[str, Any]:
    """How far the judges agree, and with ``reference``; failed judgements are no opinions."""
    opinions = [
        Opinion(m.prompt_id, (m.policy, m.baseline), m.judge, m.preference, m.order)
        for m in judgements
        if m.preference is not None
    ]
    return judge_agreement(opinions, reference=reference, **bootstrap).as_dict()


def win_rates(
    judgements: Sequence[Judgement],
    *,
    length_control: bool = False,
    style_control: bool = False,
    where_recorded: bool = False,
    table: LengthTable | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    alignment: Alignment = "alpaca_eval",
) -> list[WinRate]:
    """Win rates of judgements already in memory; see :func:`winrate_report`.

    Orders, seeds, repeated judgements, and the judges behind a pooled one are averaged inside a prompt first.
    ``holm_p`` corrects over all rows returned. ``where_recorded``: rows whose judgements record no lengths or styles go
    without the control that needs them, instead of a DataError.
    """
    groups: dict[tuple[str, str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[judgement.policy, judgement.baseline, judgement.judge].append(judgement)
    rows = []
    bootstrap: dict[str, Any] = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    for (policy, baseline, judge), members in groups.items():
        preferences = _preferences(members)
        n_failed = sum(m.preference is None for m in members)
        row = win_rate(preferences, policy=policy, baseline=baseline, judge=judge, n_failed=n_failed, **bootstrap)
        consistency, first_slot = _positions(members)
        row = replace(row, position_consistency=consistency, first_slot_rate=first_slot)
        if length_control and (not where_recorded or _recorded(members, ("length",))):
            row = _with_length_control(row, members, preferences, table, alignment, bootstrap)
        if style_control and (not where_recorded or _recorded(members, FEATURES)):
            row = _with_style_control(row, members, preferences, bootstrap)
        rows.append(row)
    return _with_holm(rows)


def _with_holm(rows: Sequence[WinRate]) -> list[WinRate]:
    return [replace(row, holm_p=p) for row, p in zip(rows, holm([row.p_value for row in rows]), strict=True)]


def _preferences(members: Sequence[Judgement]) -> Floats:
    """The preference of each prompt, in order of first appearance: the mean over judges of the mean over orders."""
    by_judge: dict[str, list[Judgement]] = defaultdict(list)
    for m in members:
        by_judge[m.source].append(m)
    # every prompt first, as not judged, so that it keeps its place
    prompts: list[object] = list(dict.fromkeys(m.prompt_id for m in members))
    values = [np.full(len(prompts), np.nan)]
    for own in by_judge.values():
        ids = [m.prompt_id for m in own]
        judged = np.array([np.nan if m.preference is None else m.preference for m in own])
        found, means = average_within_prompt(ids, _balance_orders(ids, [m.order for m in own], judged))
        prompts.extend(found.tolist())
        values.append(means)
    return average_within_prompt(prompts, np.concatenate(values))[1]


def _balance_orders(ids: Sequence[object], orders: Sequence[int | None], values: Floats) -> Floats:
    """Replace each judgement by its order's mean within the prompt, so that the prompt's mean weighs both orders alike.

    Only needed where a prompt has more judgements in one order than in the other.
    """
    sums: dict[tuple[object, int | None], list[float]] = defaultdict(list)
    for key, value in zip(zip(ids, orders, strict=True), values, strict=True):
        if not np.isnan(value):
            sums[key].append(float(value))
    seen: set[tuple[object, int | None]] = set()
    balanced = np.full(len(values), np.nan)
    for i, key in enumerate(zip(ids, orders, strict=True)):
        if key in sums and key not in seen:
            seen.add(key)
            balanced[i] = np.mean(sums[key])
    return balanced


def _positions(members: Sequence[Judgement]) -> tuple[float | None, float | None]:
    """(share of prompts with the same verdict in both orders, mean preference for the first slot), None if unknown."""
    by_order: tuple[dict[str, list[float]], dict[str, list[float]]] = (defaultdict(list), defaultdict(list))
    for m in members:
        if m.order is not None and m.preference is not None:
            by_order[m.order][m.prompt_id].append(m.preference)
    both = by_order[0].keys() & by_order[1].keys()
    if both:
        prompts = sorted(both)
        shown_first = np.array([np.mean(by_order[0][prompt]) for prompt in prompts])
        shown_second = np.array([np.mean(by_order[1][prompt]) for prompt in prompts])
        consistency = float(np.mean(np.sign(shown_first - 0.5) == np.sign(shown_second - 0.5)))
        # over prompts judged in both orders the policies' qualities cancel, and what is left is position
        return consistency, float(np.mean((shown_first + 1.0 - shown_second) / 2.0))
    if by_order[0] and by_order[1]:
        # orders were drawn by prompt: weigh both orders alike, or a strong policy shown first more often would look
        # like a position bias
        policy_first = float(np.mean([np.mean(v) for v in by_order[0].values()]))
        policy_second = float(np.mean([np.mean(v) for v in by_order[1].values()]))
        return None, (policy_first + 1.0 - policy_second) / 2.0
    return None, None


def _recorded(members: Sequence[Judgement], names: Sequence[str]) -> bool:
    fields = [f"{side}_{name}" for side in ("policy", "baseline") for name in names]
    return any(all(getattr(m, name) is not None for name in fields) for m in members)


def _by_prompt(members: Sequence[Judgement], name: str) -> Floats:
    """A field's mean over a prompt's judgements, (n,); NaN where none of them records it."""
    values = [getattr(m, name) for m in members]
    ids = [m.prompt_id for m in members]
    return average_within_prompt(ids, np.array([np.nan if x is None else x for x in values], dtype=np.float64))[1]


def _with_style_control(
    row: WinRate, members: Sequence[Judgement], preferences: Floats, bootstrap: dict[str, Any]
) -> WinRate:
    sides = [
        np.stack([_by_prompt(members, f"{side}_{feature}") for feature in FEATURES], axis=1)
        for side in ("policy", "baseline")
    ]
    if row.n_judged and np.isnan(sides[0] + sides[1]).any(axis=1).all():
        raise DataError(
            f"no judgement of {row.policy!r} records the style of its responses",
            where="style control",
            fix="judge again, or record policy_length, _lists, _headers, _bold and baseline_length, ...",
        )
    found = style_controlled_win_rate(preferences, *sides, **bootstrap)
    return replace(
        row, sc_win_rate=found.win_rate, sc_ci_low=found.ci_low, sc_ci_high=found.ci_high, style_effects=found.effects
    )


def _with_length_control(
    row: WinRate,
    members: Sequence[Judgement],
    preferences: Floats,
    table: LengthTable | None,
    alignment: Alignment,
    bootstrap: dict[str, Any],
) -> WinRate:
    lengths = [_by_prompt(members, name) for name in ("policy_length", "baseline_length")]
    usable = ~np.isnan(preferences) & ~np.isnan(lengths[0]) & ~np.isnan(lengths[1])
    if row.n_judged and not usable.any():
        raise DataError(
            f"no judgement of {row.policy!r} records lengths",
            where="length control",
            fix="record policy_length and baseline_length in characters, or leave length control out",
        )
    difficulty = None if table is None else _difficulties(members, table, alignment, row.policy)
    result = length_controlled_win_rate(
        preferences,
        lengths[0],
        lengths[1],
        difficulty=difficulty,
        table=table,
        **bootstrap,
    )
    return replace(row, lc_win_rate=result.lc_win_rate, lc_ci_low=result.ci_low, lc_ci_high=result.ci_high)


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
