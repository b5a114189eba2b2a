"""Recorded judgements in one form: duel's Parquet or JSONL files, and AlpacaEval's ``annotations.json``.

One :class:`Judgement` is one answer of one judge to one pair of responses in one order of presentation. A judgement
that failed has no preference: it is counted, and is never a tie.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from sys import intern
from typing import Any, TypedDict, cast

from toolkit.errors import DataError, RecipeError, StoreError, nearest
from toolkit.evals.intervals import DEFAULT_INTERVALS, BootstrapOptions
from toolkit.evals.style import FEATURES, style_of
from toolkit.files import parse_json, table_metadata, write_columns
from toolkit.judging.battles import ColumnsRead, battle_rows, with_known_columns
from toolkit.judging.prompt_ids import alpaca_eval_id, other_ids
from toolkit.preferences.cells import RecordError, excerpt, is_missing, name_cell, prompt_cell
from toolkit.preferences.loading import SourceRecords, local_path, messages_read, read_file
from toolkit.preferences.refusals import in_words
from toolkit.preferences.rows import prompt_id
from toolkit.preferences.single_rows import RESPONSES

_COUNTS = [f"{side}_{name}" for side in ("policy", "baseline") for name in FEATURES]
# Of a Parquet file of judgements: how the intervals of its win rates were computed.
_INTERVALS = "duel.intervals"
# The largest length or count in a row: no text is as long.
MOST = 10**12
# The name of all judges together.
POOLED = "all judges"
_REQUIRED = ("prompt_id", "policy", "baseline", "judge", "preference")


@dataclass(frozen=True, slots=True)
class Judgement:
    """One recorded judgement; ``preference`` in [0, 1] is for the policy, None where the judgement failed.

    ``order`` is 0 where the policy's response was shown first, 1 where the baseline's was, None where unknown. Lengths
    are in characters; ``*_lists``, ``*_headers`` and ``*_bold`` count marks of Markdown. ``position`` is the row's
    place in its file. ``group`` is the prompt's value of the attribute that the report is sliced by. ``source`` is the
    judge itself where ``judge`` stands for several. ``*_hash`` tie the judgement to the two responses that were judged
    (:func:`response_hash`); they are empty where the texts were not recorded.
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
    policy_lists: int | None = None
    policy_headers: int | None = None
    policy_bold: int | None = None
    baseline_lists: int | None = None
    baseline_headers: int | None = None
    baseline_bold: int | None = None
    group: str = ""
    source: str = ""
    policy_hash: str = ""
    baseline_hash: str = ""


def turned(j: Judgement) -> Judgement:
    """The same judgement seen from the other policy."""
    return replace(
        j,
        policy=j.baseline,
        baseline=j.policy,
        preference=None if j.preference is None else 1.0 - j.preference,
        order=None if j.order is None else 1 - j.order,
        policy_length=j.baseline_length,
        baseline_length=j.policy_length,
        policy_lists=j.baseline_lists,
        baseline_lists=j.policy_lists,
        policy_headers=j.baseline_headers,
        baseline_headers=j.policy_headers,
        policy_bold=j.baseline_bold,
        baseline_bold=j.policy_bold,
        policy_hash=j.baseline_hash,
        baseline_hash=j.policy_hash,
    )


def one_way(judgements: Iterable[Judgement], pairs: Iterable[tuple[str, str]] = ()) -> list[Judgement]:
    """Each pair of policies one way round: as (policy, baseline) in ``pairs``, otherwise as its first judgement."""
    turn = dict.fromkeys(pairs, False)
    out = []
    for j in judgements:
        pair = (j.policy, j.baseline)
        if pair not in turn:
            turn[pair] = pair[::-1] in turn
        out.append(turned(j) if turn[pair] else j)
    return out


class TextMeasures(TypedDict, total=False):
    """The fields of a :class:`Judgement` that describe the texts of its two responses."""

    policy_length: int | None
    baseline_length: int | None
    policy_lists: int | None
    policy_headers: int | None
    policy_bold: int | None
    baseline_lists: int | None
    baseline_headers: int | None
    baseline_bold: int | None
    policy_hash: str
    baseline_hash: str


def response_hash(text: str) -> str:
    """16 hex digits over a response's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def text_measures(policy: str, baseline: str) -> TextMeasures:
    """Lengths, marks of Markdown and hashes of a policy's and a baseline's response."""
    a, b = style_of(policy), style_of(baseline)
    return {
        "policy_length": a.length,
        "baseline_length": b.length,
        "policy_lists": a.lists,
        "policy_headers": a.headers,
        "policy_bold": a.bold,
        "baseline_lists": b.lists,
        "baseline_headers": b.headers,
        "baseline_bold": b.bold,
        "policy_hash": response_hash(policy),
        "baseline_hash": response_hash(baseline),
    }


def preference_by_score(policy: float, baseline: float) -> float:
    """1, 1/2 or 0 by which of two scores is higher."""
    return 1.0 if policy > baseline else 0.0 if policy < baseline else 0.5


def preference_by_log_odds(log_odds: float) -> float:
    """The probability with these log odds, such as a Bradley-Terry model's for a difference of rewards.

    >>> preference_by_log_odds(0.0), preference_by_log_odds(-1000.0)
    (0.5, 0.0)
    """
    return 1.0 / (1.0 + math.exp(-log_odds)) if log_odds > -700 else 0.0  # below, exp overflows


def mean_of_all(preferences: Sequence[float | None]) -> float | None:
    """The mean preference over the orders of a pair; None where one of them failed, and where there is none."""
    known = [value for value in preferences if value is not None]
    return sum(known) / len(known) if known and len(known) == len(preferences) else None


def write_judgements(
    judgements: Sequence[Judgement],
    path: Path,
    intervals: BootstrapOptions = DEFAULT_INTERVALS,
    beside: Mapping[str, Sequence[object]] | None = None,
) -> None:
    """Write a Parquet file that :func:`read_judgements` reads, whole or not at all.

    ``intervals`` are those of the win rates that were computed from these judgements. The file records them, so that
    :func:`recorded_intervals` gives the same bounds again. ``beside`` holds further columns, with a value for each
    judgement.
    """
    names = [column.name for column in fields(Judgement)] if judgements else []
    own = ((name, [getattr(judgement, name) for judgement in judgements]) for name in names)
    write_columns(chain(own, (beside or {}).items()), path, {_INTERVALS: json.dumps(intervals)})


def is_ours(path: Path) -> bool:
    """Whether a file is one that :func:`write_judgements` wrote."""
    try:
        return _INTERVALS in table_metadata(path)
    except StoreError:
        return False


def recorded_intervals(files: Sequence[str | Path]) -> BootstrapOptions | None:
    """The intervals of the win rates that were computed from ``files``; None where they do not record the same ones."""
    recorded = [_intervals_of(Path(file)) for file in files]
    return recorded[0] if recorded and all(options == recorded[0] for options in recorded) else None


def _intervals_of(path: Path) -> BootstrapOptions | None:
    if path.suffix != ".parquet" or not path.is_file():
        return None
    text = table_metadata(path, error=DataError).get(_INTERVALS)
    if text is None:
        return None
    try:
        options = parse_json(text)
        if not isinstance(options, dict) or options.keys() != DEFAULT_INTERVALS.keys():
            raise ValueError("it is of another form")
    except ValueError as error:
        raise DataError(f"the record of its intervals is damaged: {error}", where=str(path)) from error
    return cast(BootstrapOptions, options)


@dataclass(frozen=True)
class RecordedFiles:
    """The judgements of files, the votes of people in a file beside them, and which columns were read from those in
    other forms than duel's and AlpacaEval's."""

    judgements: list[Judgement]
    votes: list[Judgement]
    columns_read: list[ColumnsRead]


def read_judgements(files: Sequence[str | Path], *, by: str | None = None) -> list[Judgement]:
    """The judgements of :func:`read_recorded`."""
    return read_recorded(files, by=by).judgements


def read_recorded(
    files: Sequence[str | Path],
    *,
    votes: str | Path | None = None,
    by: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> RecordedFiles:
    """All judgements of ``files``, in the kinds of files that preference data has (``SUFFIXES`` of
    :mod:`toolkit.preferences.loading`).

    A row with ``generator_1`` and ``generator_2`` is AlpacaEval's: the policy is generator_2, the baseline generator_1,
    the preference is lowered by 1 (1..2 becomes 0..1), and 0 is a tie. A file that is reduced to lengths (``len_model``
    instead of ``output_2``) names its policy by the file's name. Other files are battles
    (:mod:`toolkit.judging.battles`). ``by`` names a column, such as AlpacaEval's ``dataset``, that becomes the
    ``group`` of each judgement of ``files``. ``columns`` maps known names of columns to those of the files that have
    them, ``votes`` among these.

    Raises:
        DataError: a file that is missing, a folder, empty, unreadable, or with rows that are not judgements; a name in
            ``columns`` that no file has.
    """
    if not files:
        raise DataError(
            "no file of recorded judgements was named", fix="name at least one .parquet, .jsonl or .json file"
        )
    paths = [Path(file) for file in (*files, *([votes] if votes is not None else []))]
    n = len(files)
    loaded_files = with_known_columns([_load(path) for path in paths], columns or {})
    read = [
        _of_file(path, loaded, by if place < n else None)
        for place, (path, loaded) in enumerate(zip(paths, loaded_files, strict=True))
    ]
    judgements, people = ([j for of_file, _ in part for j in of_file] for part in (read[:n], read[n:]))
    return RecordedFiles(judgements, people, [taken for _, taken in read if taken is not None])


def _of_file(path: Path, loaded: SourceRecords, by: str | None) -> tuple[list[Judgement], ColumnsRead | None]:
    if not loaded.records:
        raise DataError("the file holds no judgements", where=str(path))
    first = loaded.records[0][1]
    in_our_form = all(name in first for name in _REQUIRED) or {"generator_1", "generator_2"} <= first.keys()
    battles = None if in_our_form else battle_rows(loaded)
    rows = loaded.records if battles is None else battles[0]
    # Of battles the rows are made of the records, which may be many and wait on disk.
    records = dict(loaded.records) if battles is not None and by is not None else {}
    judgements = []
    for i, (number, row) in enumerate(rows):
        where = loaded.place(number)
        judgement = _judgement(row, i, path, where)
        if by is not None:
            record = row if battles is None else records[number]
            if by not in record:
                raise DataError(f"there is no column {by!r}", where=where, fix=nearest(by, record))
            if is_missing(record[by]):
                fix = "give each row a value, such as unknown, or leave the rows out"
                raise DataError(f"the column {by!r} is empty", where=where, fix=fix)
            judgement = replace(judgement, group=_value(record[by], by, where))
        judgements.append(judgement)
    return judgements, None if battles is None else battles[1]


def check_recorded_names(specs: Sequence[str]) -> None:
    """Read the files among the judges before anything is computed.

    Raises RecipeError where a judge in a file has the name of another judge of this run, or of all together, and
    DataError as :func:`read_judgements`.
    """
    live = [spec for spec in specs if not spec.startswith("file:")]
    for spec in specs:
        if spec in live:
            continue
        file = spec.partition(":")[2]
        for name in dict.fromkeys(j.judge for j in read_judgements([file])):
            if name in live or name == POOLED:
                what = "all judges together go by" if name == POOLED else "a judge of this run has"
                raise RecipeError(
                    f"the file {file} has a judge {name!r}, a name that {what}: their judgements would be mixed",
                    where="evaluate.judges",
                    fix="rename the judge in the file",
                )


def read_attributes(file: str | Path, by: str) -> dict[str, str]:
    """``prompt_id -> value`` of the column ``by``, in a file that has ``prompt_id``, ``prompt`` or ``instruction``.

    Raises:
        DataError: a missing column, or a prompt with two values.
    """
    path = Path(file)
    values: dict[str, str] = {}
    for where, row in _read_rows(path):
        names = [name for name in ("prompt_id", "prompt", "instruction") if not is_missing(row.get(name))]
        if is_missing(row.get(by)) or not names:
            fix = nearest(by, row) if by not in row else "give prompt_id, prompt or instruction"
            raise DataError(f"a row needs its prompt and {by!r}", where=where, fix=fix)
        value = _value(row[by], by, where)
        keys = [_name(row, "prompt_id", where)] if names[0] == "prompt_id" else _prompt_ids(row, names[0], where)
        for key in keys:
            if values.setdefault(key, value) != value:
                raise DataError(f"one prompt has {by} {values[key]!r} and {value!r}", where=where)
    return values


def _prompt_ids(row: Mapping[str, object], column: str, where: str) -> list[str]:
    """The ids that a row's prompt may have in judgements."""
    try:
        prompt = prompt_cell(row, [column])
    except RecordError as error:
        raise DataError(error.what, where=f"{where}, column {error.column!r}", fix=error.fix) from error
    return [prompt_id(prompt), *other_ids(prompt)]


def _read_rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of a file, each with its place."""
    loaded = _load(path)
    return [(loaded.place(number), record) for number, record in loaded.records]


def _load(path: Path) -> SourceRecords:
    if path.is_dir():
        raise DataError("a folder, not a file of judgements", where=str(path), fix="name the files inside it")
    if not local_path(str(path)).is_file():
        raise DataError("no such file", where=str(path), fix="check the path")
    return messages_read(read_file(path))


def _judgement(row: Mapping[str, Any], position: int, path: Path, where: str) -> Judgement:
    if "generator_1" in row and "generator_2" in row:
        return _alpaca_eval_judgement(row, position, path, where)
    missing = [column for column in _REQUIRED if column not in row]
    if "preference" in missing and "winner" not in row and not {*RESPONSES}.isdisjoint(row):
        raise DataError(
            "a row has a response of one system, and no judgement",
            where=where,
            fix="ask a judge first: duel judge FILE FILE --judge JUDGE --out judged.parquet, then duel winrate "
            "judged.parquet",
        )
    if missing:
        raise DataError(
            f"a judgement lacks {', '.join(missing)}",
            where=where,
            fix=f"rows need {', '.join(_REQUIRED)}; or AlpacaEval's generator_1, generator_2, preference; or a prompt, "
            f"two systems (model_a, model_b) or responses (response_a, response_b), and a winner. Map other names with "
            f"--column; the columns are {in_words(list(map(str, row)))}",
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
        prompt_id=_name(row, "prompt_id", where),
        policy=intern(_name(row, "policy", where)),  # of many rows, in memory once
        baseline=intern(_name(row, "baseline", where)),
        judge=intern(_name(row, "judge", where)),
        preference=preference,
        order=order,
        seed=_integer(row.get("seed"), "seed", where),
        error=error,
        position=position,
        source=_name(row, "source", where) if row.get("source") else "",
        **_recorded_measures(row, where),
    )


def _recorded_measures(row: Mapping[str, Any], where: str) -> TextMeasures:
    if row.get("texts"):  # of battles
        policy, baseline = row["texts"]
        return text_measures(_value(policy, "response", where), _value(baseline, "response", where))
    counts = {name: _count(row.get(name), name, where) for name in _COUNTS}
    hashes = {name: _name(row, name, where) if row.get(name) else "" for name in ("policy_hash", "baseline_hash")}
    return cast(TextMeasures, counts | hashes)


def _alpaca_eval_judgement(row: Mapping[str, object], position: int, path: Path, where: str) -> Judgement:
    preference = _number(row.get("preference"), "preference", where)
    if preference is not None and preference != 0.0 and not 1.0 <= preference <= 2.0:
        raise DataError(f"preference {preference:g} is neither 0 nor in [1, 2]", where=where)
    reduced = "len_model" in row and "output_2" not in row
    file_name = path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".jsonl")
    if "instruction_id" in row:
        identity = _name(row, "instruction_id", where)
    elif "instruction" in row:
        identity = alpaca_eval_id(_name(row, "instruction", where))
    else:
        raise DataError("an annotation lacks its instruction", where=where, fix="keep instruction or instruction_id")
    # "swapped" means that output_2, the policy's, stood first
    if row.get("swapped") not in (None, False, True, 0, 1):
        raise DataError(f"swapped is {excerpt(row['swapped'])}", where=where, fix="give true or false")
    order = None if row.get("swapped") is None else int(not row["swapped"])
    return Judgement(
        prompt_id=identity,
        policy=file_name if reduced else _name(row, "generator_2", where),
        baseline=_name(row, "generator_1", where),
        judge=_name(row, "annotator", where) if row.get("annotator") else "alpaca_eval",
        preference=None if preference is None else (0.5 if preference == 0.0 else preference - 1.0),
        order=order,
        error="no preference recorded" if preference is None else "",
        position=position,
        alpaca_eval=True,
        **_alpaca_eval_measures(row, where),
    )


def _alpaca_eval_measures(row: Mapping[str, object], where: str) -> TextMeasures:
    policy, baseline = row.get("output_2"), row.get("output_1")
    if isinstance(policy, str) and isinstance(baseline, str):
        return text_measures(_value(policy, "output_2", where), _value(baseline, "output_1", where))
    if "len_model" in row and "output_2" not in row:
        return {
            "policy_length": _count(row["len_model"], "len_model", where),
            "baseline_length": _count(row.get("len_baseline"), "len_baseline", where),
        }
    return {
        "policy_length": len(policy) if isinstance(policy, str) else None,
        "baseline_length": len(baseline) if isinstance(baseline, str) else None,
    }


def _name(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{column} is {excerpt(value)}", where=where, fix="give a text or a whole number")
    return _value(value, column, where)


def _value(value: object, column: str, where: str) -> str:
    """A value as a text that names something; whole in Unicode."""
    try:
        text = name_cell({column: value}, column)
    except RecordError as error:
        raise DataError(error.what, where=where, fix="give a text or a number") from error
    return text


def _number(value: object, name: str, where: str) -> float | None:
    """A finite float, or None for null, NaN and an empty cell. Raises DataError for what is no number."""
    if is_missing(value):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} {excerpt(value)} is not a number", where=where) from error
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise DataError(f"{name} is infinite", where=where)
    return None if math.isnan(number) else number


def _integer(value: object, name: str, where: str) -> int | None:
    number = _number(value, name, where)
    if number is None:
        return None
    if number != int(number):
        raise DataError(f"{name} {excerpt(value)} is not a whole number", where=where)
    return int(number)


def _count(value: object, name: str, where: str) -> int | None:
    number = _integer(value, name, where)
    if number is not None and not 0 <= number <= MOST:
        raise DataError(f"{name} {excerpt(value)} is no length or count", where=where, fix=f"0 to {MOST:,}")
    return number
