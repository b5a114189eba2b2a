"""Prompts without labels, from preference data of any format, from rows with a prompt, or from lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.errors import DataError
from toolkit.preferences import formats, splits
from toolkit.preferences.cells import RecordError, two_groups
from toolkit.preferences.columns import Columns, Format
from toolkit.preferences.loading import SourceRecords, decoded, load, local_path
from toolkit.preferences.parsing import last_turn, parse_transcript
from toolkit.preferences.reading import SAMPLE, column_names, parse_record, read_preferences
from toolkit.preferences.refusals import check_unicode, prompt_texts, refused
from toolkit.preferences.rows import PreferenceRow, Prompt, canonical_prompt, prompt_id
from toolkit.preferences.single_rows import prompt_columns, prompt_rows
from toolkit.preferences.stored import StoredRows


@dataclass(frozen=True)
class UnlabelledPrompt:
    """A prompt; ``group`` names others that are much like it, "" for none.

    ``where`` is its place in its source, and ``number`` that of its row or line there.
    """

    prompt: Prompt
    group: str = ""
    where: str = field(default="", compare=False)
    number: int = field(default=0, compare=False)


def read_prompts(
    source: str, *, conversational: bool | None = None, split: str = "train", limit: int | None = None, seed: int = 0
) -> list[UnlabelledPrompt]:
    """The prompts of a source, each once, in their order. Blank ones are left out.

    ``source`` is preference data as :func:`toolkit.preferences.reading.read_preferences` takes it, data in the same
    kinds of files whose rows have a prompt and no preferences (:mod:`toolkit.preferences.single_rows`), or a ``.txt``
    file with a prompt in each line.
    ``conversational`` says what the prompts have to be: chat messages, or text, without system texts and earlier turns
    in further columns; a text becomes the user's message. None takes either, but one of them in all rows. Of ``limit``
    prompts preference data gives those with the lowest hash of (``seed``, prompt), and any other source its first ones.

    Raises:
        DataError: no such source, no prompt in it, a wrong row, or messages where text is needed.
    """
    prompts: dict[str, UnlabelledPrompt] = {}
    for item in _of_source(source, conversational, split, limit, seed):
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


def _of_source(
    source: str, conversational: bool | None, split: str, limit: int | None, seed: int
) -> Iterator[UnlabelledPrompt]:
    path = local_path(source)
    if path.suffix.lower() == ".txt" and path.is_file():
        yield from _of_lines(path)
        return
    loaded = load(source, split=split, config=None, revision=None)
    columns = Columns(column_names(loaded), [record for _, record in loaded.records[:SAMPLE]])
    text_only = conversational is False
    recognised = formats.recognise(columns.names, columns.sample, text_only=text_only)
    alone = prompt_rows(columns, text_only=text_only) if recognised is None else None
    if alone is not None:
        yield from _of_rows(loaded, alone, prompt_columns(columns)[0])
        return
    rows: Sequence[PreferenceRow]
    if recognised is not None and recognised.one_response:
        rows = _stored(_of_rows(loaded, recognised))
    else:
        rows = read_preferences(source, split=split, conversational=False if text_only else None).rows
    for row in splits.limit(rows, limit, seed):
        yield UnlabelledPrompt(row.prompt, row.group, loaded.place(row.source_row), row.source_row)


def _of_rows(loaded: SourceRecords, recognised: Format, needed: str | None = None) -> Iterator[UnlabelledPrompt]:
    """The prompts of rows that compare nothing by themselves; blank ones are left out. ``needed`` is not to be null."""
    for number, record in loaded.records:
        try:
            if needed is not None and record.get(needed, "") is None:
                raise RecordError(f"{needed!r} is null", column=needed, fix="leave the row out")
            datum = parse_record(recognised, record)
        except RecordError as error:
            raise refused(loaded, number, error) from error
        check_unicode(loaded, number, prompt_texts(datum.prompt), needed or "prompt")
        if last_turn(datum.prompt).strip():
            yield UnlabelledPrompt(datum.prompt, datum.group, loaded.place(number), number)


def _stored(prompts: Iterable[UnlabelledPrompt]) -> Sequence[PreferenceRow]:
    """Each prompt once, on disk."""
    rows, seen = StoredRows(), dict[str, str]()
    for item in prompts:
        name = prompt_id(item.prompt)
        if name not in seen:
            rows.add(PreferenceRow(name, item.prompt, [], [], None, item.number, item.group), [])
        if item.group != seen.setdefault(name, item.group):
            error = two_groups(item.group, seen[name])
            raise DataError(error.what, where=item.where, fix=error.fix)
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
