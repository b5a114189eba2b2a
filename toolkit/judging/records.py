"""Recorded judgements: our own Parquet or JSONL, and AlpacaEval's ``annotations.json``, as one table.

One :class:`Judgement` is one answer of one judge to one pair of responses in one order of presentation. A judgement
that failed has no preference: it is counted, and is never a tie.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats
from toolkit.evals.length_control import LengthTable, length_controlled_win_rate, load_length_table
from toolkit.evals.winrate import WinRate, average_within_prompt, holm, win_rate

_log = logging.getLogger(__name__)

Alignment = Literal["alpaca_eval", "instruction"]
_REQUIRED = ("prompt_id", "policy", "baseline", "judge", "preference")


@dataclass(frozen=True)
class Judgement:
    """One recorded judgement; ``preference`` in [0, 1] is for the policy, None where the judgement failed.

    ``order`` is 0 where the policy's response was shown first, 1 where the baseline's was, None where unknown. Lengths
    are in characters. ``position`` is the row's place in its file.
    """

    prompt_id: str
    policy: str
    baseline: str
    judge: str
    preference: float | None
    order: int | None = None
    policy_length: int | None = None
    baseline_length: int | None = None
    seed: int | None = None
    error: str = ""
    position: int = 0
    alpaca_eval: bool = False


def read_judgements(files: Sequence[str | Path]) -> list[Judgement]:
    """All judgements of ``files``: ``.parquet``, ``.jsonl`` or ``.json``, the latter two also with ``.gz``.

    A row with ``generator_1`` and ``generator_2`` is AlpacaEval's: the policy is generator_2, the baseline generator_1,
    the preference is minus 1 (1..2 becomes 0..1), and 0 is a tie. Files reduced to lengths (``len_model`` instead of
    ``output_2``) name their policy by the file's name.

    Raises:
        DataError: a file that is missing, a folder, empty, unreadable, or with rows that are not judgements.
    """
    if not files:
        raise DataError("no file of recorded judgements given", fix="name at least one .parquet, .jsonl or .json file")
    judgements: list[Judgement] = []
    for file in files:
        path = Path(file)
        rows = _read_rows(path)
        if not rows:
            raise DataError("the file holds no judgements", where=str(path))
        judgements.extend(_judgement(row, i, path) for i, row in enumerate(rows))
    return judgements


def _read_rows(path: Path) -> list[dict[str, object]]:
    if path.is_dir():
        raise DataError("a folder, not a file of judgements", where=str(path), fix="name the files inside it")
    if not path.is_file():
        raise DataError("no such file", where=str(path), fix="check the path")
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            table: list[dict[str, object]] = pyarrow.parquet.read_table(path).to_pylist()
            return table
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read the file: {error}", where=str(path)) from error
    if name.endswith(".jsonl"):
        lines = enumerate(text.split("\n"), start=1)
        rows: object = [_parse_json(line, f"{path}:{number}") for number, line in lines if line.strip()]
    elif name.endswith(".json"):
        rows = _parse_json(text, str(path))
        if isinstance(rows, dict):
            rows = rows.get("judgements", rows)
    else:
        raise DataError("unknown file type", where=str(path), fix="use .parquet, .jsonl(.gz) or .json(.gz)")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError("expected a list of judgements, one object each", where=str(path))
    return rows


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error}", where=where) from error


def _judgement(row: Mapping[str, object], position: int, path: Path) -> Judgement:
    where = f"{path}, row {position}"
    if "generator_1" in row and "generator_2" in row:
        return _alpaca_eval_judgement(row, position, path, where)
    missing = [column for column in _REQUIRED if column not in row]
    if missing:
        raise DataError(
            f"a judgement lacks {', '.join(missing)}",
            where=where,
            fix=f"rows need {', '.join(_REQUIRED)}; or AlpacaEval's generator_1, generator_2, preference",
        )
    preference = _number(row["preference"], "preference", where)
    error = str(row.get("error") or "")
    if error or preference is None:
        preference, error = None, error or "no preference recorded"
    elif not 0.0 <= preference <= 1.0:
        raise DataError(f"preference {preference:g} is outside [0, 1]", where=where, fix="1 means the policy won")
    order = _integer(row.get("order"), "order", where)
    if order not in (None, 0, 1):
        raise DataError(f"order {order} is neither 0 nor 1", where=where, fix="0: the policy is shown first; 1: second")
    return Judgement(
        prompt_id=str(row["prompt_id"]),
        policy=str(row["policy"]),
        baseline=str(row["baseline"]),
        judge=str(row["judge"]),
        preference=preference,
        order=order,
        policy_length=_integer(row.get("policy_length"), "policy_length", where),
        baseline_length=_integer(row.get("baseline_length"), "baseline_length", where),
        seed=_integer(row.get("seed"), "seed", where),
        error=error,
        position=position,
    )


def _alpaca_eval_judgement(row: Mapping[str, object], position: int, path: Path, where: str) -> Judgement:
    preference = _number(row.get("preference"), "preference", where)
    if preference is not None and preference != 0.0 and not 1.0 <= preference <= 2.0:
        raise DataError(f"preference {preference:g} is neither 0 nor in [1, 2]", where=where)
    reduced = "len_model" in row and "output_2" not in row
    if reduced:
        policy = path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".jsonl")
        policy_length = _integer(row["len_model"], "len_model", where)
        baseline_length = _integer(row.get("len_baseline"), "len_baseline", where)
    else:
        policy = str(row["generator_2"])
        policy_length, baseline_length = _length(row.get("output_2")), _length(row.get("output_1"))
    if "instruction_id" in row:
        prompt_id = str(row["instruction_id"])
    elif "instruction" in row:
        prompt_id = hashlib.sha1(str(row["instruction"]).encode(), usedforsecurity=False).hexdigest()[:12]
    else:
        raise DataError("an annotation lacks its instruction", where=where, fix="keep instruction or instruction_id")
    # "swapped" means that output_2, the policy's, stood first
    order = None if row.get("swapped") is None else int(not row["swapped"])
    return Judgement(
        prompt_id=prompt_id,
        policy=policy,
        baseline=str(row["generator_1"]),
        judge=str(row.get("annotator") or "alpaca_eval"),
        preference=None if preference is None else (0.5 if preference == 0.0 else preference - 1.0),
        order=order,
        policy_length=policy_length,
        baseline_length=baseline_length,
        error="no preference recorded" if preference is None else "",
        position=position,
        alpaca_eval=True,
    )


def _length(output: object) -> int | None:
    return len(output) if isinstance(output, str) else None


def _number(value: object, name: str, where: str) -> float | None:
    """A finite float, or None for null and NaN. Raises DataError for anything that is not a number."""
    if value is None:
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} {value!r} is not a number", where=where) from error
    if math.isinf(number):
        raise DataError(f"{name} is infinite", where=where)
    return None if math.isnan(number) else number


def _integer(value: object, name: str, where: str) -> int | None:
    number = _number(value, name, where)
    if number is None:
        return None
    if number != int(number):
        raise DataError(f"{name} {value!r} is not a whole number", where=where)
    return int(number)


def winrate_report(
    files: Sequence[str | Path],
    *,
    length_control: bool = False,
    lc_table: str | Path | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    alignment: Alignment = "alpaca_eval",
) -> list[dict[str, str | float | int | None]]:
    """One row of ``win_rates`` for each (policy, baseline, judge) in ``files``, in order of first appearance.

    ``lc_table`` (a folder) implies ``length_control``. ``alignment`` says how a row of an AlpacaEval file finds its
    instruction's difficulty: "alpaca_eval" by its place in the file, as the published numbers do, even where an earlier
    instruction is missing and shifts the rest; "instruction" by the instruction itself. Other files, and files that
    hold too little of the benchmark, go by the instruction (``prompt_id`` = AlpacaEval's instruction id).

    Raises:
        DataError: as :func:`read_judgements`; or length control without recorded lengths, or a table that does not know
            the instructions.
    """
    table = load_length_table(lc_table) if lc_table is not None else None
    rows = win_rates(
        read_judgements(files),
        length_control=length_control or table is not None,
        table=table,
        n_resamples=n_resamples,
        confidence=confidence,
        seed=seed,
        alignment=alignment,
    )
    return [row.as_dict() for row in rows]


def win_rates(
    judgements: Sequence[Judgement],
    *,
    length_control: bool = False,
    table: LengthTable | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    alignment: Alignment = "alpaca_eval",
) -> list[WinRate]:
    """Win rates of judgements already in memory; see :func:`winrate_report`. Orders, seeds and repeated judgements are
    averaged inside a prompt first. ``holm_p`` corrects over all rows returned."""
    groups: dict[tuple[str, str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[judgement.policy, judgement.baseline, judgement.judge].append(judgement)
    rows = []
    for (policy, baseline, judge), members in groups.items():
        ids = [m.prompt_id for m in members]
        values = np.array([np.nan if m.preference is None else m.preference for m in members])
        _, preferences = average_within_prompt(ids, _balance_orders(members, values))
        row = win_rate(
            preferences,
            policy=policy,
            baseline=baseline,
            judge=judge,
            n_failed=int(np.isnan(values).sum()),
            n_resamples=n_resamples,
            confidence=confidence,
            seed=seed,
        )
        consistency, first_slot = _positions(members)
        row = replace(row, position_consistency=consistency, first_slot_rate=first_slot)
        if length_control:
            row = _with_length_control(row, members, preferences, table, n_resamples, confidence, seed, alignment)
        rows.append(row)
    adjusted = holm([row.p_value for row in rows])
    return [replace(row, holm_p=p) for row, p in zip(rows, adjusted, strict=True)]


def _balance_orders(members: Sequence[Judgement], values: Floats) -> Floats:
    """Replace each judgement by its order's mean within the prompt, so that the prompt's mean weighs both orders alike.

    Only needed where a prompt has more judgements in one order than in the other.
    """
    sums: dict[tuple[str, int | None], list[float]] = defaultdict(list)
    for member, value in zip(members, values, strict=True):
        if not np.isnan(value):
            sums[member.prompt_id, member.order].append(float(value))
    seen: set[tuple[str, int | None]] = set()
    balanced = np.full(len(values), np.nan)
    for i, member in enumerate(members):
        key = (member.prompt_id, member.order)
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


def _with_length_control(
    row: WinRate,
    members: Sequence[Judgement],
    preferences: Floats,
    table: LengthTable | None,
    n_resamples: int,
    confidence: float,
    seed: int,
    alignment: Alignment,
) -> WinRate:
    ids = [m.prompt_id for m in members]
    lengths = [
        average_within_prompt(ids, np.array([np.nan if x is None else x for x in column], dtype=np.float64))[1]
        for column in ([m.policy_length for m in members], [m.baseline_length for m in members])
    ]
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
        n_resamples=n_resamples,
        confidence=confidence,
        seed=seed,
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
