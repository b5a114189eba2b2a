"""Prompts without labels, from preference data of any format, from rows with a prompt, or from lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.errors import DataError
from toolkit.preferences import formats, splits
from toolkit.preferences.cells import RecordError, name_cell, prompt_cell
from toolkit.preferences.columns import GROUP, PROMPTS, Columns, Format
from toolkit.preferences.loading import SourceRecords, decoded, load, local_path
from toolkit.preferences.parsing import last_turn, parse_transcript
from toolkit.preferences.reading import SAMPLE, column_names, parse_record, read_preferences
from toolkit.preferences.refusals import check_unicode, prompt_texts, row_error
from toolkit.preferences.rows import PreferenceRow, Prompt, canonical_prompt, prompt_id
from toolkit.preferences.stored import StoredRows

# The columns that hold the prompts of a file without preferences; the first that is there counts.
COLUMNS = (*PROMPTS, "messages")


@dataclass(frozen=True)
class UnlabelledPrompt:
    """A prompt; ``group`` names others that are much like it, "" for none. ``where`` is its place in its source."""

    prompt: Prompt
    group: str = ""
    where: str = field(default="", compare=False)


def read_prompts(
    source: str, *, conversational: bool | None = None, split: str = "train", limit: int | None = None, seed: int = 0
) -> list[UnlabelledPrompt]:
    """The prompts of a source, each once, in their order. Blank ones are left out.

    ``source`` is preference data as :func:`toolkit.preferences.reading.read_preferences` takes it, data in the same
    kinds of files whose rows have one of ``COLUMNS`` and no preferences (``input`` follows ``instruction``), or a
    ``.txt`` file with a prompt in each line.
    ``conversational`` says what the prompts have to be: chat messages, or text; a text becomes the user's message. None
    takes either, but one of them in all rows. Of ``limit`` prompts preference data gives those with the lowest hash of
    (``seed``, prompt), and any other source its first ones.

    Raises:
        DataError: no such source, no prompt in it, a wrong row, or messages where text is needed.
    """
    prompts: dict[str, UnlabelledPrompt] = {}
    for item in _of_source(source, split, limit, seed):
        prompt = of_kind(item.prompt, conversational, item.where)
        prompts.setdefault(canonical_prompt(prompt), replace(item, prompt=prompt))
    if not prompts:
        raise DataError("there is no prompt", where=source, fix="put one prompt on each line")
    _check_one_kind(list(prompts.values()))
    return list(prompts.values())[:limit]


def of_kind(prompt: Prompt, conversational: bool | None, where: str) -> Prompt:
    """A text as messages where the prompts have to be ``conversational``; a transcript has several. None takes either.

    Raises DataError for messages where they have to be text.
    """
    if conversational and isinstance(prompt, str):
        return parse_transcript(prompt) or [{"role": "user", "content": prompt}]
    if conversational is False and not isinstance(prompt, str):
        raise DataError(
            "the prompt is chat messages, and those of the training data are text",
            where=where,
            fix="write it as text, or set data.conversational: true",
        )
    return prompt


def _of_source(source: str, split: str, limit: int | None, seed: int) -> Iterator[UnlabelledPrompt]:
    path = local_path(source)
    if path.suffix.lower() == ".txt" and path.is_file():
        yield from _of_lines(path)
        return
    loaded = load(source, split=split, config=None, revision=None)
    names = column_names(loaded)
    columns = Columns(names).prompts or tuple(name for name in COLUMNS if name in names)[:1]
    recognised = formats.recognise(names, [record for _, record in loaded.records[:SAMPLE]])
    if recognised is not None and recognised.one_response:
        rows = splits.limit(_of_one_response(loaded, recognised), limit, seed)
    elif recognised is not None or not columns:
        rows = splits.limit(read_preferences(source, split=split).rows, limit, seed)
    else:
        yield from _of_rows(loaded, columns)
        return
    yield from (UnlabelledPrompt(row.prompt, row.group, loaded.place(row.source_row)) for row in rows)


def _of_rows(loaded: SourceRecords, columns: Sequence[str]) -> Iterator[UnlabelledPrompt]:
    """The prompts of rows without preferences."""
    column = columns[0]
    for number, record in loaded.records:
        try:
            if record.get(column, "") is None:
                raise RecordError(f"{column!r} is null", column=column, fix="leave the row out")
            prompt, group = prompt_cell(record, columns), name_cell(record, GROUP)
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        texts = prompt_texts(prompt)
        check_unicode(loaded, number, texts, column)
        if texts and texts[-1].strip():
            yield UnlabelledPrompt(prompt, group, loaded.place(number))


def _of_one_response(loaded: SourceRecords, recognised: Format) -> Sequence[PreferenceRow]:
    """The prompts of rows with one response each, also those that no second row has."""
    rows, seen = StoredRows(), set[str]()
    for number, record in loaded.records:
        try:
            datum = parse_record(recognised, record)
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        check_unicode(loaded, number, prompt_texts(datum.prompt), "prompt")
        name = prompt_id(datum.prompt)
        if name not in seen and last_turn(datum.prompt).strip():
            seen.add(name)
            rows.add(PreferenceRow(name, datum.prompt, [], [], None, number, datum.group), [])
    return rows


def _of_lines(path: Path) -> Iterator[UnlabelledPrompt]:
    """The lines of a text file that are not blank."""
    for number, line in enumerate(decoded(path.read_bytes(), str(path)).split("\n"), start=1):
        where = f"{path}, line {number}"
        if "\0" in line:
            raise DataError("this is no line of text: it holds a NUL", where=where, fix="name a text file")
        if line.strip():
            yield UnlabelledPrompt(line.strip(), where=where)


def _check_one_kind(prompts: Sequence[UnlabelledPrompt]) -> None:
    """Raises DataError where some prompts are text and others are messages."""
    first: dict[bool, UnlabelledPrompt] = {}
    for item in prompts:
        first.setdefault(isinstance(item.prompt, str), item)
    if len(first) == 2:
        raise DataError(
            f"prompts are partly text, partly messages: {first[False].where} holds messages",
            where=first[True].where,
            fix="use one kind",
        )
