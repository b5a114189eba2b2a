"""Responses that no preference is known of, as ``duel score`` and ``duel rewards`` take them: rows of ``prompt`` and
``response``, and samples of a run.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from toolkit.errors import DataError
from toolkit.evals.distinct import equals
from toolkit.measure.outputs import output_columns, output_of
from toolkit.measure.responses import prompts_of_run
from toolkit.preferences import formats
from toolkit.preferences.cells import RecordError, name_cell
from toolkit.preferences.columns import GROUP
from toolkit.preferences.loading import SourceRecords, load, local_path
from toolkit.preferences.parsing import parse_transcript
from toolkit.preferences.reading import DataReport, PreferenceData, column_names
from toolkit.preferences.refusals import check_unicode, prompt_texts, row_error
from toolkit.preferences.rows import PreferenceRow, Prompt, prompt_id
from toolkit.preferences.samples import SAMPLES_FILE, SampleTable, is_samples, table_samples
from toolkit.preferences.stored import StoredRows
from toolkit.storage.lazy import Computed
from toolkit.storage.spilled import Spill

# (row, prompt, response, group)
Single = tuple[int, Prompt, str, str]


def read_single_responses(source: str, split: str, *, text_only: bool) -> PreferenceData | None:
    """The responses of a source without preferences, by prompt and without comparisons; every row is one response.

    None for preference data. Transcripts become messages where all of them can be, unless ``text_only``. Blank rows are
    left out, and counted. The rows wait on disk.

    Raises DataError for a wrong row, and for a source without a usable one.
    """
    path = local_path(source)
    if is_samples(path) and (path / SAMPLES_FILE if path.is_dir() else path).is_file():
        file = path / SAMPLES_FILE if path.is_dir() else path
        return _together(_stored(_of_samples(path, file)), str(file), "samples")
    loaded = load(source, split=split, config=None, revision=None)
    names = column_names(loaded)
    sample = [record for _, record in loaded.records[:100]]
    if formats.recognise(names, sample) is not None or not {"response", "output", "completion", "answer"} & {*names}:
        return None
    stored = _stored(_of_rows(loaded))
    singles: Sequence[Single] = stored
    if not text_only and _are_transcripts(prompt for _, prompt, _, _ in stored):
        singles = Computed(stored, _with_messages)
    return replace(_together(singles, loaded.name, "single responses"), fingerprint=loaded.fingerprint or "")


def _stored(singles: Iterable[Single]) -> Sequence[Single]:
    stored = Spill()
    for values in singles:
        stored.append(values)

    def single(place: int) -> Single:
        number, prompt, response, group = stored[place]
        return number, prompt, response, group

    return Computed(range(len(stored)), single)


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
    number, prompt, response, group = single
    return number, parse_transcript(prompt) or prompt if isinstance(prompt, str) else prompt, response, group


def _of_samples(path: Path, file: Path) -> Iterator[Single]:
    samples = SampleTable(table_samples(path, ["prompt_id", "prompt", "response"]))
    last = {sample.prompt_id: place for place, sample in enumerate(samples)}
    asked_of = prompts_of_run(file, last, lambda key: samples[last[key]].prompt)
    for number, sample in enumerate(samples, start=1):
        prompt, group = asked_of(sample.prompt_id)
        yield number, prompt, sample.response, group


def _of_rows(loaded: SourceRecords) -> Iterator[Single]:
    columns = output_columns(loaded)
    for number, record in loaded.records:
        try:
            _, prompt, response = output_of(record, columns)
            group = name_cell(record, GROUP)
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        check_unicode(loaded, number, [*prompt_texts(prompt), response], str(columns["response"]))
        yield number, prompt, response, group


def _together(singles: Sequence[Single], name: str, kind: str) -> PreferenceData:
    """One row for each prompt, with all of its responses, equal ones too: each is a row of the source."""
    usable, keys = array("q"), array("Q")  # the places of those with texts, and the 16 hex digits of their prompts
    empty: list[int] = []
    kinds = set[bool]()
    for place, (number, prompt, response, _) in enumerate(singles):
        texts = prompt_texts(prompt)
        if not texts or not texts[-1].strip() or not response.strip():
            empty.append(number)
            continue
        usable.append(place)
        keys.append(int(prompt_id(prompt), 16))
        kinds.add(isinstance(prompt, str))
    if not usable:
        raise DataError(f"no usable row of {len(singles)}: every prompt or response is empty", where=name)
    if len(kinds) > 1:
        raise DataError("prompts are partly text, partly messages", where=name, fix="use one kind")
    stored = StoredRows()
    for places in equals(np.frombuffer(keys, np.int64)):
        of_prompt = [singles[usable[place]] for place in places.tolist()]
        number, prompt, _, group = of_prompt[0]
        responses = [response for _, _, response, _ in of_prompt]
        row = PreferenceRow(prompt_id(prompt), prompt, responses, [], None, number, group)
        stored.add(row, [number for number, _, _, _ in of_prompt])
    report = DataReport(
        source=name,
        format=kind,
        conversational=kinds == {False},
        n_rows_read=len(singles),
        n_prompts=len(stored),
        n_responses=len(usable),
        n_empty=len(empty),
        empty_rows=tuple(empty[:5]),
        n_unjudged=len(stored),
        n_groups=stored.n_groups,
        n_comparisons=0,
        n_ties=0,
        n_annotators=0,
        n_unparsable=0,
        n_identical=0,
        n_duplicates=0,
        n_contradictions=0,
        n_unlabelled=0,
        n_multi_turn=0,
        n_prompt_repeated=0,
        n_booleans=0,
    )
    return PreferenceData(stored, report, "")
