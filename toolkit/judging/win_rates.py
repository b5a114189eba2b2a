"""Win rates, rankings and the agreement of judges, from recorded judgements.

This module groups judgements and averages them inside prompts. The statistics themselves are in ``evals/``.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError, nearest
from toolkit.evals.intervals import DEFAULT_INTERVALS, Floats
from toolkit.evals.judge_agreement import Opinion, judge_agreement
from toolkit.evals.length_control import LengthTable
from toolkit.evals.style import FEATURES
from toolkit.evals.verdict import ARMS
from toolkit.evals.winrate import WinRate, average_within_prompt, bradley_terry, exact_ties, holm, win_rate
from toolkit.judging.controls import (
    Alignment,
    IntervalOptions,
    prompt_numbers,
    recorded_fields,
    with_length_control,
    with_style_control,
)
from toolkit.judging.human_votes import corrected_win_rates
from toolkit.judging.records import POOLED, Judgement, one_way, read_attributes, read_recorded, recorded_intervals

_log = logging.getLogger(__name__)

_OF_JUDGE = "\0"  # in the source of a pooled judgement, between the judge and its own source
_MOST_GROUPS = 50  # an attribute with more values is an identifier, and its values are no slices


@dataclass(frozen=True)
class Controls:
    """Further win rates, corrected for what is not quality.

    ``length`` adds the length-controlled win rate, with AlpacaEval's ``table`` where there is one; ``style`` adds the
    win rate at equal length, lists, headers and bold. ``where_recorded``: a row whose judgements record no lengths or
    styles goes without the control, instead of a DataError.

    ``alignment``: a row of an AlpacaEval file gets the difficulty of its instruction by the row's place in the file
    ("alpaca_eval", as the published numbers do, even where an earlier instruction is missing and shifts the rest), or
    by the instruction itself ("instruction"). Other files, and files that hold too little of the benchmark, always go
    by the instruction (``prompt_id`` is AlpacaEval's instruction id).
    """

    length: bool = False
    style: bool = False
    table: LengthTable | None = None
    alignment: Alignment = "alpaca_eval"
    where_recorded: bool = False


NO_CONTROLS = Controls()
RECORDED_CONTROLS = Controls(length=True, style=True, where_recorded=True)


def winrate_report(
    files: Sequence[str | Path],
    *,
    controls: Controls = NO_CONTROLS,
    by: str | None = None,
    attributes: str | Path | None = None,
    pool_judges: bool = False,
    ranking: bool = False,
    reference: str | None = None,
    human: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    **intervals: Unpack[IntervalOptions],
) -> dict[str, Any]:
    """:func:`report` of the judgements recorded in ``files``.

    ``intervals`` that are not named here are those that the files record (a run's file gives the run's own bounds),
    or the defaults where they record none or different ones.
    ``by`` adds win rates for each value of a prompt's attribute. The attribute is a column of ``files``, or of
    ``attributes``, a file of prompts. ``human`` names a file with the votes of people on some of the prompts: the
    judges' win rates, corrected by them, are under ``prediction_powered``, the pairs with too few votes under
    ``prediction_powered_left_out``. ``columns`` maps known names of columns to
    those of the files; ``columns_read`` says what was read from files of battles.

    Raises:
        DataError: as :func:`read_recorded` and :func:`report`; an attribute that a prompt lacks, ``attributes`` without
            ``by``.
    """
    if attributes is not None and by is None:
        raise DataError("a file of attributes, and no attribute", where="--attributes", fix="name its column with --by")
    recorded = read_recorded(files, votes=human, by=by if attributes is None else None, columns=columns)
    judgements = recorded.judgements
    options: IntervalOptions = {**(recorded_intervals(files) or DEFAULT_INTERVALS), **intervals}
    if by is not None and attributes is not None:
        values = read_attributes(attributes, by)
        unknown = next((j.prompt_id for j in judgements if j.prompt_id not in values), None)
        if unknown is not None:
            fix = "give the file of prompts that were judged"
            raise DataError(f"no {by} for prompt {unknown}", where=str(attributes), fix=fix)
        judgements = [replace(j, group=values[j.prompt_id]) for j in judgements]
    result = report(
        judgements,
        controls=controls,
        by=by,
        pool_judges=pool_judges,
        ranking=ranking,
        reference=reference,
        **options,
    )
    if human is not None:
        confidence = options.get("confidence", DEFAULT_INTERVALS["confidence"])
        corrected = corrected_win_rates(one_way(judgements), recorded.votes, by_prompt, confidence)
        result |= {"prediction_powered": corrected.rows, "prediction_powered_left_out": corrected.left_out}
    if recorded.columns_read:
        result["columns_read"] = [asdict(columns_of_file) for columns_of_file in recorded.columns_read]
    return result


def by_prompt(members: Sequence[Judgement]) -> dict[str, float]:
    """The preference of each judged prompt: the mean over judges of the mean over orders."""
    prompts = dict.fromkeys(m.prompt_id for m in members)
    preferences = zip(prompts, _preferences(members).tolist(), strict=True)
    return {prompt: value for prompt, value in preferences if not np.isnan(value)}


def report(
    judgements: Sequence[Judgement],
    *,
    controls: Controls = NO_CONTROLS,
    by: str | None = None,
    pool_judges: bool = False,
    ranking: bool = True,
    reference: str | None = None,
    **intervals: Unpack[IntervalOptions],
) -> dict[str, Any]:
    """``{"win_rates": [...], "bradley_terry": [...], "judge_agreement": {...} or None, "intervals": {...}}``.

    The values are JSON types. ``intervals`` are the resamples, coverage and seed of every interval.

    Each pair of policies is seen one way round, as its first judgement has it, whichever of the two a later file calls
    the policy. ``win_rates`` has a row for each (policy, baseline, judge), in order of first appearance.
    ``pool_judges`` adds rows for all judges together, averaged inside each prompt. ``by`` names the attribute behind
    the judgements' groups, and adds rows for each group. ``bradley_terry`` has a row for each judge that compared three
    or more policies, unless ``ranking`` is off. ``judge_agreement`` is there for two or more judges. It compares them
    with ``reference``, or with ``gold`` where that is one of them.

    Raises:
        DataError: as :func:`win_rates`; an attribute with more than 50 values; a ``reference`` that judged nothing, or
            that is the only judge.
    """
    judgements = one_way(judgements)
    judges = {j.judge for j in judgements}
    if reference is not None and judges <= {reference}:
        what = f"{reference!r} is the only judge, and there is no other to measure against it"
        raise DataError(what, where="reference", fix="add a file of another judge, or leave --reference out")
    if reference is not None and reference not in judges:
        raise DataError(f"judge {reference!r} judged nothing here", where="reference", fix=nearest(reference, judges))
    _note_single_orders(judgements)
    with_pool = judgements + (_pooled(judgements) if pool_judges and len(judges) > 1 else [])
    rows = win_rates(with_pool, controls, **intervals)
    if by is not None:
        rows += _sliced(with_pool, by, controls, **intervals)
    agreement = None
    if len(judges) > 1:
        agreement = agreement_of(judgements, reference or ("gold" if "gold" in judges else None), **intervals)
    return {
        "win_rates": [row.as_dict() for row in rows],
        "bradley_terry": rankings(judgements, **intervals) if ranking else [],
        "judge_agreement": agreement,
        "intervals": {**DEFAULT_INTERVALS, **intervals},
    }


def _sliced(
    judgements: Sequence[Judgement], by: str, controls: Controls, **intervals: Unpack[IntervalOptions]
) -> list[WinRate]:
    """Win rates inside each group of judgements, corrected for their number among themselves."""
    groups = sorted({j.group for j in judgements})
    if len(groups) > _MOST_GROUPS:
        raise DataError(f"{by!r} takes {len(groups)} values", where="slices", fix="name an attribute with few")
    if controls.table is not None:  # AlpacaEval's regression is fitted on the whole benchmark
        controls = replace(controls, length=False, table=None)
    rows = []
    for group in groups:
        members = [j for j in judgements if j.group == group]
        rows += [replace(row, slice=f"{by}={group}") for row in win_rates(members, controls, **intervals)]
    return _with_holm(rows)


def rankings(judgements: Sequence[Judgement], **intervals: Unpack[IntervalOptions]) -> list[dict[str, Any]]:
    """Bradley-Terry strengths for each judge that compared three or more policies, the strongest policy first."""
    by_judge: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        by_judge[judgement.judge].append(judgement)
    return [
        _ranking(judge, members, **intervals)
        for judge, members in by_judge.items()
        if len({name for m in members for name in (m.policy, m.baseline)}) >= 3
        and any(m.preference is not None for m in members)
    ]


def _ranking(judge: str, members: Sequence[Judgement], **intervals: Unpack[IntervalOptions]) -> dict[str, Any]:
    # one row for each comparison: its orders, seeds and samples are averaged first
    comparisons = list(dict.fromkeys((m.prompt_id, m.policy, m.baseline) for m in members))
    number = {key: k for k, key in enumerate(comparisons)}
    ids = [number[m.prompt_id, m.policy, m.baseline] for m in members]
    preferences = exact_ties(average_within_prompt(ids, _balance_orders(members))[1])
    fit = bradley_terry(
        [prompt for prompt, _, _ in comparisons],
        [policy for _, policy, _ in comparisons],
        [baseline for _, _, baseline in comparisons],
        preferences,
        **intervals,
    )
    # those without a strength come last
    strengths = [-math.inf if strength is None else strength for strength in fit.log_strength]
    strongest_first = sorted(range(len(strengths)), key=lambda k: -strengths[k])
    rows = [
        {
            "policy": fit.policies[k],
            "log_strength": fit.log_strength[k],
            "ci_low": fit.ci_low[k],
            "ci_high": fit.ci_high[k],
            "win_rate": fit.win_rate[k],
        }
        for k in strongest_first
    ]
    return {
        "judge": judge,
        "policies": rows,
        "n_prompts": fit.n,
        "n_judged": int(np.sum(~np.isnan(preferences))),
        "n_failed": sum(m.preference is None for m in members),
        "n_tied": int(np.sum(preferences == 0.5)),
    }


def agreement_of(
    judgements: Sequence[Judgement], reference: str | None, **intervals: Unpack[IntervalOptions]
) -> dict[str, Any]:
    """How far the judges agree with each other, and with ``reference``. Failed judgements are no opinions.

    What the win rate leaves out as half judged, a judge's agreement leaves out too (``_balance_orders``).
    """
    of_judge: dict[str, list[Judgement]] = defaultdict(list)
    for m in judgements:
        of_judge[m.judge].append(m)
    opinions = []
    for members in of_judge.values():
        of_pairs = _places_by_pair(members)
        half = {i for pair in _half_judged(members, of_pairs) for i in of_pairs[pair]}
        opinions += [
            Opinion(m.prompt_id, (m.policy, m.baseline), m.judge, m.preference, m.order, half=i in half)
            for i, m in enumerate(members)
            if m.preference is not None
        ]
    return judge_agreement(opinions, reference=reference, **intervals).as_dict()


def win_rates(
    judgements: Sequence[Judgement], controls: Controls = NO_CONTROLS, **intervals: Unpack[IntervalOptions]
) -> list[WinRate]:
    """One row for each (policy, baseline, judge), in order of first appearance.

    Orders, seeds, repeated judgements, and the judges that are pooled are averaged inside a prompt first.
    ``holm_p`` corrects over all rows returned.

    Raises:
        DataError: length control without recorded lengths, style control without recorded styles, a table that does not
            know the instructions.
    """
    groups: dict[tuple[str, str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[judgement.policy, judgement.baseline, judgement.judge].append(judgement)
    rows = []
    for (policy, baseline, judge), members in groups.items():
        preferences = _preferences(members)
        n_failed = sum(m.preference is None for m in members)
        row = win_rate(preferences, policy=policy, baseline=baseline, judge=judge, n_failed=n_failed, **intervals)
        consistency, first_slot = _positions(members)
        row = replace(row, position_consistency=consistency, first_slot_rate=first_slot)
        if controls.length and (not controls.where_recorded or recorded_fields(members, ("length",))):
            row = with_length_control(row, members, preferences, controls.table, controls.alignment, **intervals)
        if controls.style and (not controls.where_recorded or recorded_fields(members, FEATURES)):
            row = with_style_control(row, members, preferences, **intervals)
        rows.append(row)
    return _with_holm(rows)


def pooled_win_rate(
    judgements: Sequence[Judgement], judges: Sequence[str], **intervals: Unpack[IntervalOptions]
) -> WinRate | None:
    """The two arms compared by several judges together, averaged inside prompts; None where none of them did.

    A judgement of DPO against RM + PPO counts as one of RM + PPO against DPO.
    """
    members = [j for j in judgements if j.judge in judges and {j.policy, j.baseline} == set(ARMS)]
    return win_rates(_pooled(one_way(members, [ARMS])), **intervals)[0] if members else None


def _pooled(judgements: Sequence[Judgement]) -> list[Judgement]:
    """The judgements as those of all judges together, with the judge before the source: a crowd keeps its voters.

    Several judges' rows are sorted, since the bootstrap draws prompts by their place: which judge comes first must not
    move the interval. One judge's rows stay in place, so that the interval is that of the judge's row.
    """
    pooled = [replace(j, judge=POOLED, source=f"{j.judge}{_OF_JUDGE}{j.source}") for j in judgements]
    if len({j.judge for j in judgements}) < 2:
        return pooled
    return sorted(
        pooled,
        key=lambda j: (
            *(j.prompt_id, j.source, j.policy_hash, j.baseline_hash),
            -1 if j.order is None else j.order,
            -1.0 if j.preference is None else j.preference,
        ),
    )


def _with_holm(rows: Sequence[WinRate]) -> list[WinRate]:
    return [replace(row, holm_p=p) for row, p in zip(rows, holm([row.p_value for row in rows]), strict=True)]


def _preferences(members: Sequence[Judgement]) -> Floats:
    """The preference of each prompt, in order of first appearance: the mean over judges of :func:`_of_judge`."""
    numbers = prompt_numbers(members)
    n = int(numbers.max()) + 1 if len(members) else 0
    if not members or members[0].judge != POOLED:
        return _of_judge(members, numbers, n)
    by_judge: dict[str, list[int]] = defaultdict(list)
    for i, m in enumerate(members):
        by_judge[m.source.partition(_OF_JUDGE)[0]].append(i)
    values = [_of_judge([members[i] for i in at], numbers[at], n) for at in by_judge.values()]
    return average_within_prompt(np.tile(np.arange(n), len(values)), np.concatenate(values))[1]


def _of_judge(members: Sequence[Judgement], numbers: NDArray[np.int64], n: int) -> Floats:
    """One judge's preference (n,) of each prompt by its number: the mean over sources of the mean over orders."""
    by_source: dict[str, list[int]] = defaultdict(list)
    for i, m in enumerate(members):
        by_source[m.source].append(i)
    asked = None
    if len(by_source) > 1:  # a crowd: whether places were drawn shows in all of its votes
        asked = _asked_in_both_orders(members, _places_by_pair(members))
    # every prompt first, as not judged, so that it keeps its place
    prompts: list[NDArray[np.generic]] = [np.arange(n)]
    values = [np.full(n, np.nan)]
    for at in by_source.values():
        of_source = members if len(at) == len(members) else [members[i] for i in at]
        distinct, means = average_within_prompt(numbers[at], _balance_orders(of_source, asked))
        prompts.append(distinct)
        values.append(means)
    return average_within_prompt(np.concatenate(prompts), np.concatenate(values))[1]


def _pair_of(judgement: Judgement) -> tuple[object, ...]:
    """The two responses that were judged, by their hashes; by their lengths where no texts were recorded. And who of
    several judged them."""
    j = judgement
    responses = (j.policy_hash, j.baseline_hash) if j.policy_hash else (j.policy_length, j.baseline_length)
    return (j.policy, j.baseline, j.prompt_id, *responses, j.source)


def _places_by_pair(members: Sequence[Judgement]) -> dict[tuple[object, ...], list[int]]:
    """Where the judgements of each pair of responses stand among ``members``."""
    of_pairs: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, m in enumerate(members):
        of_pairs[_pair_of(m)].append(i)
    return of_pairs


def _asked_in_both_orders(
    members: Sequence[Judgement], of_pairs: Mapping[tuple[object, ...], Sequence[int]]
) -> set[tuple[object, object]]:
    """(policy, baseline) of which pairs of responses were shown in both orders, whether or not that gave an answer.

    Not those whose places were drawn: some people were shown a pair that others had seen in the other order, but more
    pairs were shown in one order alone, and of these a quarter or more in each of the two.
    """
    if not {0, 1} <= {m.order for m in members}:
        return set()
    counts: dict[tuple[object, object], Counter[frozenset[int]]] = defaultdict(Counter)
    for (policy, baseline, *_), at in of_pairs.items():
        counts[policy, baseline][frozenset(order for i in at if (order := members[i].order) is not None)] += 1
    asked = set()
    for systems, seen in counts.items():
        both, alone = seen[frozenset({0, 1})], (seen[frozenset({0})], seen[frozenset({1})])
        drawn = both < sum(alone) and min(alone) >= sum(alone) / 4
        if both and not drawn:
            asked.add(systems)
    return asked


def _half_judged(
    members: Sequence[Judgement],
    of_pairs: Mapping[tuple[object, ...], Sequence[int]],
    asked: Collection[tuple[object, object]] | None = None,
) -> set[tuple[object, ...]]:
    """The pairs that have a value in one order alone, of systems whose pairs the judge saw in both (``asked``)."""
    both_orders = _asked_in_both_orders(members, of_pairs) if asked is None else asked
    half = set()
    for pair, at in of_pairs.items() if both_orders else ():
        answered = {members[i].order for i in at if members[i].preference is not None}
        if pair[:2] in both_orders and len(answered & {0, 1}) == 1:
            half.add(pair)
    return half


def _balance_orders(members: Sequence[Judgement], asked: Collection[tuple[object, object]] | None = None) -> Floats:
    """The value of each pair of responses of one judge, as often as the pair was sampled; NaN for its other judgements.

    The value is the mean of the pair's orders. Judgements in one order are averaged first, so that both orders weigh
    alike. A policy that gives the same response in three of four samples has three pairs of equal texts, which count
    three times: in one order the judge has answered three times, with the same seed. Where the judge saw pairs in both
    orders, a pair with a value in one of them alone counts as not judged: the judge's taste for a place would count as
    its preference. A judge that saw each pair in one order, such as a person who votes, is complete, and so is a crowd
    whose pairs were shown in an order that was drawn.
    """
    if len({(m.policy, m.baseline, m.prompt_id) for m in members}) == len(members):  # each was judged once
        return np.array([np.nan if m.preference is None else m.preference for m in members], dtype=np.float64)
    of_pairs = _places_by_pair(members)
    half = _half_judged(members, of_pairs, asked)
    balanced = np.full(len(members), np.nan)
    for pair, at in of_pairs.items():
        by_order: dict[int | None, list[float]] = defaultdict(list)
        for i in at:
            if (preference := members[i].preference) is not None:
                by_order[members[i].order].append(preference)
        if by_order and pair not in half:
            value = _mean([_mean(by_order[order]) for order in sorted(by_order, key=str)])
            balanced[at[: _times_sampled(members, at)]] = value
    return balanced


def _times_sampled(members: Sequence[Judgement], at: Sequence[int]) -> int:
    """How often a pair of responses, whose judgements stand ``at``, was sampled: an order and seed saw each once."""
    if len(at) == 1 or (len(at) == 2 and members[at[0]].order != members[at[1]].order):
        return 1
    return max(Counter((members[i].order, members[i].seed) for i in at).values())


def _mean(values: Sequence[float]) -> float:
    """NumPy's mean, which takes most of the time of many short lists."""
    return values[0] if len(values) == 1 else float(np.mean(values))


def _note_single_orders(members: Sequence[Judgement]) -> None:
    """Say which judges were not asked about each pair of responses in both orders."""
    by_judge: dict[str, list[Judgement]] = defaultdict(list)
    for m in members:
        if m.order is not None:
            by_judge[m.judge].append(m)
    for judge, of_judge in by_judge.items():
        if not _asked_in_both_orders(of_judge, _places_by_pair(of_judge)):
            _log.warning("judge %s did not see each pair in both orders: position bias is not controlled", judge)


def _positions(members: Sequence[Judgement]) -> tuple[float | None, float | None]:
    """(share of prompts with the same verdict in both orders, mean preference for the first slot), None if unknown.

    Over pairs of different texts: about equal ones no judge is asked, and their ties say nothing of it.
    """
    members = [m for m in members if not m.policy_hash or m.policy_hash != m.baseline_hash]
    if not {0, 1} <= {m.order for m in members if m.preference is not None}:
        return None, None
    by_order: tuple[dict[str, list[float]], dict[str, list[float]]] = (defaultdict(list), defaultdict(list))
    for m in members:
        if m.order is not None and m.preference is not None:
            by_order[m.order][m.prompt_id].append(m.preference)
    both = by_order[0].keys() & by_order[1].keys()
    if both:
        prompts = sorted(both)
        shown_first = np.array([_mean(by_order[0][prompt]) for prompt in prompts])
        shown_second = np.array([_mean(by_order[1][prompt]) for prompt in prompts])
        sides = [np.sign(exact_ties(shown) - 0.5) for shown in (shown_first, shown_second)]
        consistency = float(np.mean(sides[0] == sides[1]))
        # over prompts judged in both orders the policies' qualities cancel, and what is left is position
        return consistency, float(np.mean((shown_first + 1.0 - shown_second) / 2.0))
    # each prompt was judged in one order: weigh both orders alike, or a strong policy that was shown first more
    # often would look like a position bias
    policy_first = float(np.mean([_mean(v) for v in by_order[0].values()]))
    policy_second = float(np.mean([_mean(v) for v in by_order[1].values()]))
    return None, (policy_first + 1.0 - policy_second) / 2.0
