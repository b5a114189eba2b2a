"""Responses that no preference is known of, as ``duel score`` and ``duel rewards`` take them: rows of ``prompt`` and
``response``, and samples of a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from toolkit.errors import DataError
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
from toolkit.preferences.samples import SAMPLES_FILE, is_samples, read_samples
from toolkit.preferences.stored import StoredRows

# (row, prompt, response, group)
Single = tuple[int, Prompt, str, str]


def read_single_responses(source: str, split: str, *, text_only: bool) -> PreferenceData | None:
    """The responses of a source without preferences, by prompt and without comparisons; every row is one response.

    None for preference data. Transcripts become messages where all of them can be, unless ``text_only``. Blank rows are
    left out, and counted.

    Raises DataError for a wrong row, and for a source without a usable one.
    """
    path = local_path(source)
    if is_samples(path) and (path / SAMPLES_FILE if path.is_dir() else path).is_file():
        file = path / SAMPLES_FILE if path.is_dir() else path
        return _together(_of_samples(source), str(file), "samples")
    loaded = load(source, split=split, config=None, revision=None)
    names = column_names(loaded)
    sample = [record for _, record in loaded.records[:100]]
    if formats.recognise(names, sample) is not None or not {"response", "output", "completion", "answer"} & {*names}:
        return None
    singles = list(_of_rows(loaded))
    texts = [prompt for _, prompt, _, _ in singles if isinstance(prompt, str)]
    if texts and not text_only and all(parse_transcript(text) is not None for text in texts):
        singles = [
            (number, parse_transcript(prompt) or prompt if isinstance(prompt, str) else prompt, response, group)
            for number, prompt, response, group in singles
        ]
    return replace(_together(singles, loaded.name, "single responses"), fingerprint=loaded.fingerprint or "")


def _of_samples(source: str) -> list[Single]:
    path = local_path(source)
    samples = read_samples(path, ["prompt_id", "prompt", "response"])
    file = path / SAMPLES_FILE if path.is_dir() else path
    prompts = prompts_of_run(file, {sample.prompt_id: sample.prompt for sample in samples})
    return [(k, prompts[sample.prompt_id], sample.response, "") for k, sample in enumerate(samples, start=1)]


def _of_rows(loaded: SourceRecords) -> Iterable[Single]:
    columns = output_columns(loaded)
    for number, record in loaded.records:
        try:
            _, prompt, response = output_of(record, columns)
            group = name_cell(record, GROUP)
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        check_unicode(loaded, number, [*prompt_texts(prompt), response], str(columns["response"]))
        yield number, prompt, response, group


def _together(singles: Iterable[Single], name: str, kind: str) -> PreferenceData:
    """One row for each prompt, with all of its responses, equal ones too: each is a row of the source."""
    rows: dict[str, PreferenceRow] = {}
    numbers: dict[str, list[int]] = {}
    n, empty = 0, []
    for number, prompt, response, group in singles:
        n += 1
        texts = prompt_texts(prompt)
        if not texts or not texts[-1].strip() or not response.strip():
            empty.append(number)
            continue
        key = prompt_id(prompt)
        rows.setdefault(key, PreferenceRow(key, prompt, [], [], None, number, group)).responses.append(response)
        numbers.setdefault(key, []).append(number)
    if not rows:
        raise DataError(f"no usable row of {n}: every prompt or response is empty", where=name)
    kinds = {isinstance(row.prompt, str) for row in rows.values()}
    if len(kinds) > 1:
        raise DataError("prompts are partly text, partly messages", where=name, fix="use one kind")
    report = DataReport(
        source=name,
        format=kind,
        conversational=kinds == {False},
        n_rows_read=n,
        n_prompts=len(rows),
        n_responses=sum(len(row.responses) for row in rows.values()),
        n_empty=len(empty),
        empty_rows=tuple(empty[:5]),
        n_unjudged=len(rows),
        n_groups=len({row.group for row in rows.values() if row.group}),
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
    stored = StoredRows()
    for key, row in rows.items():
        stored.add(row, numbers[key])
    return PreferenceData(stored, report, "")
