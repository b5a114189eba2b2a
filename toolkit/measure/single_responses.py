"""Responses one by one, as ``duel score`` and ``duel rewards`` take them: rows of ``prompt`` and ``response``, with or
without a score, and samples of a run.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np

from toolkit.errors import DataError
from toolkit.evals.distinct import equals
from toolkit.measure.outputs import output_columns, output_of
from toolkit.measure.responses import prompts_of_run
from toolkit.preferences import formats, splits
from toolkit.preferences.cells import RecordError, name_cell
from toolkit.preferences.columns import GROUP, Format
from toolkit.preferences.loading import SourceRecords, load, local_path
from toolkit.preferences.merging import FIRST_ROWS
from toolkit.preferences.parsing import by_value, parse_transcript
from toolkit.preferences.reading import SAMPLE, DataReport, PreferenceData, column_names, parse_record
from toolkit.preferences.refusals import check_unicode, prompt_texts, row_error
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, prompt_id
from toolkit.preferences.samples import SAMPLES_FILE, SampleTable, is_samples, table_samples
from toolkit.preferences.stored import StoredRows
from toolkit.storage.lazy import Computed
from toolkit.storage.spilled import Spill


class Single(NamedTuple):
    """A row of the source: a response to a prompt, with its score where the data has one."""

    number: int
    prompt: Prompt
    response: str
    group: str
    score: float | None = None


def read_single_responses(source: str, split: str, *, text_only: bool, compared: bool = False) -> PreferenceData | None:
    """The responses of a source whose rows hold one response each, by prompt; every row is one response.

    Responses to one prompt are compared with each other by their scores, where the rows are known to have such
    (``Format.one_response``). None for other preference data, and with ``compared`` for such rows too: their responses
    that nothing is compared with are of no use then. Transcripts become messages where all of them can be, unless
    ``text_only``. Blank rows are left out, and counted. The rows wait on disk.

    Raises DataError for a wrong row, and for a source without a usable one.
    """
    path = local_path(source)
    if is_samples(path) and (path / SAMPLES_FILE if path.is_dir() else path).is_file():
        file = path / SAMPLES_FILE if path.is_dir() else path
        return _together(_stored(_of_samples(path, file)), str(file), "samples")
    loaded = load(source, split=split, config=None, revision=None)
    names = column_names(loaded)
    recognised = formats.recognise(names, [record for _, record in loaded.records[:SAMPLE]], text_only=text_only)
    if recognised is not None and recognised.one_response and not compared:
        stored = _stored(_of_scored_rows(loaded, recognised))
    elif recognised is None and {"response", "output", "completion", "answer"} & {*names}:
        stored = _stored(_of_rows(loaded))
    else:
        return None
    singles: Sequence[Single] = stored
    if not text_only and _are_transcripts(single.prompt for single in stored):
        singles = Computed(stored, _with_messages)
    kind = recognised.name if recognised is not None else "single responses"
    return replace(_together(singles, loaded.name, kind), fingerprint=loaded.fingerprint or "")


def _stored(singles: Iterable[Single]) -> Sequence[Single]:
    stored = Spill()
    for single in singles:
        stored.append(tuple(single))
    return Computed(range(len(stored)), lambda place: Single(*stored[place]))


def _are_transcripts(prompts: Iterable[Prompt]) -> bool:
    """Whether there are prompts of text, and all of them can be read as messages."""
    n = 0
    for prompt in prompts:
        if isinstance(prompt, str):
            if parse_transcript(prompt) is None:
                return False
            n += 1
    return n > 0


def _with_messages(single: Single) -> Single:
    if not isinstance(single.prompt, str):
        return single
    return single._replace(prompt=parse_transcript(single.prompt) or single.prompt)


def _of_samples(path: Path, file: Path) -> Iterator[Single]:
    samples = SampleTable(table_samples(path, ["prompt_id", "prompt", "response"]))
    last = {sample.prompt_id: place for place, sample in enumerate(samples)}
    asked_of = prompts_of_run(file, last, lambda key: samples[last[key]].prompt)
    for number, sample in enumerate(samples, start=1):
        prompt, group = asked_of(sample.prompt_id)
        yield Single(number, prompt, sample.response, group)


def _of_rows(loaded: SourceRecords) -> Iterator[Single]:
    columns = output_columns(loaded)
    for number, record in loaded.records:
        try:
            _, prompt, response = output_of(record, columns)
            group = name_cell(record, GROUP)
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        check_unicode(loaded, number, [*prompt_texts(prompt), response], str(columns["response"]))
        yield Single(number, prompt, response, group)


def _of_scored_rows(loaded: SourceRecords, recognised: Format) -> Iterator[Single]:
    for number, record in loaded.records:
        try:
            datum = parse_record(recognised, record)
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        [response] = datum.responses
        check_unicode(loaded, number, [*prompt_texts(datum.prompt), response], "response")
        yield Single(number, datum.prompt, response, datum.group, datum.score)


def _together(singles: Sequence[Single], name: str, kind: str) -> PreferenceData:
    """One row for each prompt, with all of its responses, equal ones too: each is a row of the source."""
    usable, keys = array("q"), array("Q")  # the places of those with texts, and the 16 hex digits of their prompts
    empty: list[int] = []
    kinds = set[bool]()
    for place, single in enumerate(singles):
        texts = prompt_texts(single.prompt)
        if not texts or not texts[-1].strip() or not single.response.strip():
            empty.append(single.number)
            continue
        usable.append(place)
        keys.append(int(prompt_id(single.prompt), 16))
        kinds.add(isinstance(single.prompt, str))
    if not usable:
        raise DataError(f"no usable row of {len(singles)}: every prompt or response is empty", where=name)
    if len(kinds) > 1:
        raise DataError("prompts are partly text, partly messages", where=name, fix="use one kind")
    stored = StoredRows()
    n_comparisons = n_ties = n_unjudged = n_unlabelled = 0
    for places in equals(np.frombuffer(keys, np.int64)):
        of_prompt = [singles[usable[place]] for place in places.tolist()]
        row = _row(of_prompt)
        stored.add(row, [single.number for single in of_prompt])
        judged = splits.labelled_pairs(row.comparisons)
        n_comparisons += len(judged)
        n_ties += sum(pair.p == 0.5 for pair in judged)
        n_unjudged += not judged
        n_scored = sum(single.score is not None for single in of_prompt)
        n_unlabelled += comb(len(of_prompt), 2) - comb(n_scored, 2) if n_scored else 0
    report = DataReport(
        source=name,
        format=kind,
        conversational=kinds == {False},
        n_rows_read=len(singles),
        n_prompts=len(stored),
        n_responses=len(usable),
        n_empty=len(empty),
        empty_rows=tuple(empty[:FIRST_ROWS]),
        n_unjudged=n_unjudged,
        n_groups=stored.n_groups,
        n_comparisons=n_comparisons,
        n_ties=n_ties,
        n_annotators=0,
        n_unparsable=0,
        n_identical=0,
        n_duplicates=0,
        n_contradictions=0,
        n_unlabelled=n_unlabelled,
        n_multi_turn=0,
        n_prompt_repeated=0,
        n_booleans=0,
    )
    return PreferenceData(stored, report, "")


def _row(of_prompt: Sequence[Single]) -> PreferenceRow:
    """The responses to one prompt, each compared with each by their scores; two equal texts are not compared."""
    first, responses = of_prompt[0], [single.response for single in of_prompt]
    compared: list[Comparison] = []
    if any(single.score is not None for single in of_prompt):
        by_score = by_value(first.prompt, responses, [single.score for single in of_prompt], "").comparisons
        compared = [c for c in by_score if responses[c.winner] != responses[c.loser]]
    return PreferenceRow(prompt_id(first.prompt), first.prompt, responses, compared, None, first.number, first.group)
