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
from toolkit.measure.responses import prompts_of_run
from toolkit.preferences import formats, splits
from toolkit.preferences.cells import RecordError, odd_one, two_groups
from toolkit.preferences.columns import Columns, Format
from toolkit.preferences.loading import SourceRecords, load, local_path, place_in
from toolkit.preferences.merging import FIRST_ROWS
from toolkit.preferences.parsing import by_value
from toolkit.preferences.reading import (
    SAMPLE,
    DataReport,
    PreferenceData,
    as_conversation,
    column_names,
    parse_record,
)
from toolkit.preferences.refusals import check_unicode, in_words, prompt_texts, refused
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, prompt_id
from toolkit.preferences.samples import SAMPLES_FILE, SampleTable, is_samples, table_samples
from toolkit.preferences.single_rows import RESPONSES, response_rows
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


def read_single_responses(
    source: str, split: str, *, conversational: bool | None = None, compared: bool = False
) -> PreferenceData | None:
    """The responses of a source whose rows hold one response each, by prompt; every row is one response.

    Responses to one prompt are compared with each other by their scores, where the rows are known to have such
    (``Format.one_response``). None for other preference data, and with ``compared`` for such rows too: their responses
    that nothing is compared with are of no use then. Prompts are read as a run reads them, ``conversational`` included
    (:func:`toolkit.preferences.reading.read_preferences`). Blank rows are left out, and counted. The rows wait on disk.

    Raises DataError for a wrong row, and for a source without a usable one.
    """
    path = local_path(source)
    if is_samples(path) and (path / SAMPLES_FILE if path.is_dir() else path).is_file():
        file = path / SAMPLES_FILE if path.is_dir() else path
        return _together(_stored(_of_samples(path, file)), str(file), "samples")
    loaded = load(source, split=split, config=None, revision=None)
    columns = Columns(column_names(loaded), [record for _, record in loaded.records[:SAMPLE]])
    text_only = conversational is False
    recognised = formats.recognise(columns.names, columns.sample, text_only=text_only)
    if recognised is None and columns.first(RESPONSES):
        recognised = response_rows(columns, text_only=text_only)
        if recognised is None:
            fix = "rows need prompt and response, or instruction and output; or name a run's samples.parquet"
            what = f"no column holds the prompt: the columns are {in_words(columns.names)}"
            raise DataError(what, where=loaded.name, fix=fix)
    elif recognised is None or not recognised.one_response or compared:
        return None
    stored = _stored(_of_rows(loaded, recognised, conversational))
    return replace(_together(stored, loaded.name, recognised.name), fingerprint=loaded.fingerprint or "")


def _stored(singles: Iterable[Single]) -> Sequence[Single]:
    stored = Spill()
    for single in singles:
        stored.append(tuple(single))
    return Computed(range(len(stored)), lambda place: Single(*stored[place]))


def _of_samples(path: Path, file: Path) -> Iterator[Single]:
    samples = SampleTable(table_samples(path, ["prompt_id", "prompt", "response"]))
    last = {sample.prompt_id: place for place, sample in enumerate(samples)}
    asked_of = prompts_of_run(file, last, lambda key: samples[last[key]].prompt)
    for number, sample in enumerate(samples, start=1):
        prompt, group = asked_of(sample.prompt_id)
        yield Single(number, prompt, sample.response, group)


def _of_rows(loaded: SourceRecords, recognised: Format, conversational: bool | None) -> Iterator[Single]:
    for number, record in loaded.records:
        try:
            datum = parse_record(recognised, record)
            if conversational is not False:  # texts stay as they are then, and so do messages, which a run refuses
                datum = as_conversation(recognised, datum, conversational)
        except RecordError as error:
            raise refused(loaded, number, error) from error
        [response] = datum.responses
        check_unicode(loaded, number, [*prompt_texts(datum.prompt), response], "prompt or response")
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
        groups = [single.group for single in of_prompt]
        if (k := odd_one(groups)) is not None:
            error = two_groups(groups[k], groups[0])
            raise DataError(error.what, where=place_in(name, of_prompt[k].number), fix=error.fix)
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
