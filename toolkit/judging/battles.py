"""Battles as people record them: pairs of systems with a winner, under the names that published files use.

Chatbot Arena's votes, MT-bench's judgements (by people, and by GPT-4 in both orders), Arena-Hard's games, PandaLM's
pairs and preference sets that name the models behind their responses become rows of duel's own form. All rows of a
prompt have one ``prompt_id``: orders and repeats inside a prompt are one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolkit.errors import DataError, nearest
from toolkit.judging.prompt_ids import plain_prompt
from toolkit.preferences.cells import RecordError, cell, excerpt, is_missing, messages_from, name_cell, prompt_cell
from toolkit.preferences.columns import CONTEXTS, ONE_HOT, PAIRS, PROMPTS, SCORE_PAIRS, Columns
from toolkit.preferences.formats import label_columns
from toolkit.preferences.loading import SourceRecords
from toolkit.preferences.parsing import ANNOTATOR_COLUMN, CHOICES, PROBABILITIES, SIGNED, label_reader, verdict_of
from toolkit.preferences.refusals import check_label_base, in_words, row_error
from toolkit.preferences.rows import Record, prompt_id

# duel's own name first: whoever gives it names the prompt, whatever its text.
PROMPT_IDS = ("prompt_id", "question_id", "uid", "instruction_id", "qid", "id", "idx")
SYSTEM_PAIRS = (
    ("model_a", "model_b"),
    ("model_1", "model_2"),
    ("chosen_model", "rejected_model"),
    ("chosen-model", "rejected-model"),
    ("response_0_source", "response_1_source"),
)
SIDES = ("chosen", "rejected")
JUDGES = ("judge", "judge_model", "annotator")
# Arena-Hard's verdicts. A great win counts as a win: a prompt is one unit, whatever its games say.
GAMES = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B=A": 0.5, "B>A": 0.0, "B>>A": 0.0, "A<B": 0.0, "A<<B": 0.0}
MOST_JUDGES = 10  # more names in a column are those of people who voted now and then
RECORDED = "recorded"  # the judge of a file that names none
NO_VERDICT = ("", "error", "none", "null")
MT_BENCH = ("g1_winner", "g2_winner")
_BY_COLUMN = ("chosen",)  # the first system is always the winner
Row = dict[str, Any]
Verdict = Callable[[Record], float | None]


@dataclass(frozen=True)
class ColumnsRead:
    """What a file's columns were taken for. ``note`` says what else was done with its rows."""

    file: str
    prompt: str
    systems: str
    winner: str
    judge: str
    n_judgements: int
    note: str = ""


@dataclass(frozen=True)
class _Layout:
    """How rows are read: the columns, and the verdict of each judge by the judge's column ("" for the one named in
    ``judge``). A layout of ``games`` has several verdicts in a row, one for each order of presentation.

    ``labels`` are columns where 1 is the first, 2 the second and 0 a tie.
    """

    prompt: str
    systems: tuple[str, ...]
    winner: tuple[str, ...]
    verdicts: Mapping[str, Verdict]
    judge: str = ""
    responses: tuple[str, str] | None = None
    labels: tuple[str, ...] = ()
    games: Callable[[Record], Iterator[tuple[int, float | None]]] | None = None

    def rows(self, record: Record) -> Iterator[Row]:
        """The judgements of one record. Raises RecordError for a verdict that is none."""
        policy, baseline = systems = self._systems(record)
        judge = _judge(record, self.judge) if self.judge else RECORDED
        row: Row = {"prompt_id": _prompt_id(record, self.prompt), "policy": policy, "baseline": baseline, "texts": None}
        if self.games is not None:
            for order, preference in self.games(record):
                yield {**row, "judge": judge, "preference": preference, "order": order}
            return
        texts = [_answer(record, column) for column in self.responses or ()]
        row["texts"] = texts if len(texts) == 2 and None not in texts else None
        for column, verdict in self.verdicts.items():
            preference = _preference(record, verdict, self.winner, systems)
            yield {**row, "judge": column or judge, "preference": preference}

    def _systems(self, record: Record) -> tuple[str, str]:
        if len(self.systems) == 1:  # PandaLM's "opt-7b_llama-7b"
            first, _, second = name_cell(record, self.systems[0]).partition("_")
            return first, second
        if self.responses is not None and self.systems == self.responses:  # they go by the columns' names
            return self.responses
        first, second = (name_cell(record, column) if column in record else column for column in self.systems)
        if first == second:
            raise RecordError(f"{first!r} is compared with itself", column=self.systems[0])
        return first, second


def battle_rows(loaded: SourceRecords) -> tuple[list[tuple[int, Row]], ColumnsRead] | None:
    """(number of the record, judgement in duel's form) of a file of battles, and the columns that were read.

    A judgement's ``texts`` are both responses, where they are there. None for a file that is none of battles. Raises
    DataError for a row that says nothing, with its place.
    """
    sample = [record for _, record in loaded.records[:100]]
    columns = Columns(tuple(dict.fromkeys(str(name) for record in sample for name in record)), sample)
    layout = _games_layout(columns) or _pair_layout(columns)
    if layout is None:
        return None
    check_label_base(loaded, layout.labels, mappable=True)
    rows: list[tuple[int, Row]] = []
    for number, record in loaded.records:
        try:
            rows += [(number, row) for row in layout.rows(record)]
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
    note = _with_orders([row for _, row in rows], layout)
    return rows, ColumnsRead(
        loaded.name,
        layout.prompt or "the row",
        " and ".join(layout.systems),
        ", ".join(layout.winner),
        ", ".join(filter(None, layout.verdicts)) or layout.judge or "none is named",
        len(rows),
        note,
    )


def with_known_columns(files: Sequence[SourceRecords], columns: Mapping[str, str]) -> list[SourceRecords]:
    """The records with ``columns`` (a known name -> the file's name) applied, in the files that have them.

    Raises DataError for a name that no file has.
    """
    present = [{str(name) for _, record in loaded.records[:100] for name in record} for loaded in files]
    for name in columns.values():
        if not any(name in of_file for of_file in present):
            where = in_words([loaded.name for loaded in files])
            raise DataError(f"there is no column {name!r}", where=where, fix=nearest(name, set().union(*present)))
    out = []
    for loaded, of_file in zip(files, present, strict=True):
        names = {name: known for known, name in columns.items() if name in of_file}
        # What has the name of a mapped column is not read; in battles a prompt that was named goes before its id.
        no_ids = "prompt" in names.values() and not {"policy", "baseline"} <= of_file
        hidden = {*names.values(), *(PROMPT_IDS[:1] if no_ids else ())} - names.keys()
        records: list[tuple[int, Record]] = [
            (number, {names.get(key, key): value for key, value in record.items() if key not in hidden})
            for number, record in loaded.records
        ]
        out.append(replace(loaded, records=records) if names else loaded)
    return out


# ---------------------------------------------------------------------------------------------------- layouts
def _games_layout(columns: Columns) -> _Layout | None:
    """Arena-Hard's games, and MT-bench's judgements by a model, in both orders."""
    prompt, judge = columns.first(PROMPT_IDS) or "", columns.first(JUDGES) or ""
    if columns.has("games", "model"):
        return _Layout(prompt, ("model", "baseline"), ("games",), {}, judge, games=_arena_hard)
    if columns.has(*MT_BENCH, "model_1", "model_2"):
        return _Layout(prompt, ("model_1", "model_2"), MT_BENCH, {}, judge, games=_mt_bench)
    return None


def _pair_layout(columns: Columns) -> _Layout | None:
    """One verdict, or one of each annotator, on two systems or on two columns of responses."""
    systems = columns.first_pair(SYSTEM_PAIRS)
    responses = columns.first_pair((*PAIRS, SIDES))
    names: tuple[str, ...] | None = systems or (responses if responses != SIDES else None)
    if systems is None and columns.has("cmp_key") and all("_" in str(key) for key in columns.cells("cmp_key")):
        names = ("cmp_key",)
    if names is None:
        return None
    prompt = columns.first((PROMPT_IDS[0], *PROMPTS, *CONTEXTS, "conversation_a", *PROMPT_IDS[1:])) or ""
    judge = columns.first(JUDGES) or ""
    if systems is not None and systems[0].startswith("chosen"):
        always: dict[str, Verdict] = {"": lambda record: 1.0}
        return _Layout(prompt, systems, _BY_COLUMN, always, judge, responses if responses == SIDES else None)
    pair = responses if responses != SIDES else None
    labels = label_columns(columns, pair)
    if labels and ANNOTATOR_COLUMN.fullmatch(labels[0]):
        verdicts = {name: _labelled(name) for name in labels}
        return _Layout(prompt, names, labels, verdicts, judge, pair, labels)
    if labels:
        counted = () if {*labels} & {*PROBABILITIES, *CHOICES, *SIGNED, "labels"} else labels
        return _Layout(prompt, names, labels, {"": _labelled(labels[0])}, judge, pair, counted)
    several = ONE_HOT if columns.has(*ONE_HOT[:2]) else columns.first_pair(SCORE_PAIRS)
    if several is None:
        return None
    return _Layout(prompt, names, several, {"": lambda r: verdict_of(r, several)}, judge, pair)


def _labelled(column: str) -> Verdict:
    read = label_reader(column)
    return lambda record: read(cell(record, column), column)


# ---------------------------------------------------------------------------------------------------- single records
def _preference(record: Record, verdict: Verdict, winner: Sequence[str], systems: tuple[str, str]) -> float | None:
    """P(the first system is preferred); None for a verdict that was not given. A winner may be a system's name."""
    value = record.get(winner[0])
    if len(winner) == 1 and isinstance(value, str) and value in systems:
        return float(value == systems[0])
    return None if len(winner) == 1 and winner != _BY_COLUMN and _is_no_verdict(value) else verdict(record)


def _prompt_id(record: Record, column: str) -> str:
    """A prompt's identity: that of its text, or the identifier that the record gives."""
    if not column:
        raise RecordError("no column names the prompt", fix="map it, as in --column prompt=NAME")
    if column.startswith("conversation"):
        messages = messages_from(record.get(column) or [], column)
        return prompt_id(next((m["content"] for m in messages if m["role"] == "user"), ""))
    if column in PROMPT_IDS:
        name = name_cell(record, column)
        if not name:  # all such rows would be one prompt
            raise RecordError(f"{column!r} is empty", column=column, fix="give each row the id of its prompt")
        return name
    return prompt_id(plain_prompt(prompt_cell(record, [column, "input"] if column == "instruction" else [column])))


def _answer(record: Record, column: str) -> str | None:
    """The text of a response, or of all answers in a conversation."""
    value = record.get(column)
    if isinstance(value, list):
        return "\n\n".join(m["content"] for m in messages_from(value, column) if m["role"] == "assistant")
    return value if isinstance(value, str) else None


def _judge(record: Record, column: str) -> str:
    """A judge's name; of MT-bench's ["gpt-4", "pair-v2"] the first."""
    value = record.get(column)
    return str(value[0]) if isinstance(value, list) and value else name_cell(record, column) or RECORDED


def _arena_hard(record: Record) -> Iterator[tuple[int, float | None]]:
    """(order, P(the model is preferred)): the baseline is A in the first game, and the model in the second."""
    games = cell(record, "games")
    if not isinstance(games, list) or not games:
        raise RecordError("'games' is no list of games", column="games")
    for k, game in enumerate(games):
        score = game.get("score") if isinstance(game, Mapping) else None
        if score is not None and score not in GAMES:
            raise RecordError(f"the score {excerpt(score)} of a game is not known", column="games", fix="A>B or A=B")
        first = None if score is None else GAMES[score]
        model_is_first = k % 2 == 1
        yield int(not model_is_first), first if first is None or model_is_first else 1.0 - first


def _mt_bench(record: Record) -> Iterator[tuple[int, float | None]]:
    """(order, P(model_1 is preferred)): it is shown first in the first game, and second in the second."""
    for order, column in enumerate(MT_BENCH):
        yield order, None if _is_no_verdict(cell(record, column)) else label_reader("winner")(record[column], column)


def _is_no_verdict(value: object) -> bool:
    return is_missing(value) or (isinstance(value, str) and value.strip().lower() in NO_VERDICT)


# ---------------------------------------------------------------------------------------------------- all rows
def _with_orders(rows: Sequence[Row], layout: _Layout) -> str:
    """Turn each pair of systems one way round, add orders, and join the judges of a crowd. Returns a note."""
    directions = {(row["policy"], row["baseline"]) for row in rows}
    # Where each system stands first at times, the first one was shown first (Arena); elsewhere files are sorted.
    # Chosen and rejected responses are sorted by the verdict, which says nothing of places.
    turned = layout.winner != _BY_COLUMN and any(
        (baseline, policy) in directions for policy, baseline in directions if policy != baseline
    )
    way: dict[frozenset[str], tuple[str, str]] = {}
    for row in rows:
        pair = (row["policy"], row["baseline"])
        first = way.setdefault(frozenset(pair), pair)
        order = row.get("order", 0 if turned else None)
        if pair != first:
            row["policy"], row["baseline"] = first
            row["preference"] = None if row["preference"] is None else 1.0 - row["preference"]
            row["texts"] = row["texts"] and row["texts"][::-1]
            order = None if order is None else 1 - order
        row["order"] = order
        row["error"] = "no verdict recorded" if row["preference"] is None else ""
    judges = {row["judge"] for row in rows}
    if len(judges) <= MOST_JUDGES:
        return ""
    for row in rows:
        row["source"], row["judge"] = row["judge"], f"{len(judges)} judges"
    return f"{len(judges)} judges in {layout.judge!r} are read as one"
