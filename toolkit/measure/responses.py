"""Responses that are there already, to be labelled: those of preference data, of unlabelled rows, or of a run."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.evals.distinct import equals
from toolkit.measure.options import PromptSelection
from toolkit.preferences import formats, splits
from toolkit.preferences.cells import RecordError, odd_one, two_groups
from toolkit.preferences.columns import Columns, Format
from toolkit.preferences.loading import SourceRecords, load, local_path
from toolkit.preferences.reading import SAMPLE, DataReport, column_names, parse_record, read_preferences
from toolkit.preferences.refusals import check_unicode, prompt_texts, refused
from toolkit.preferences.rows import PreferenceRow, Prompt, canonical_prompt, prompt_id
from toolkit.preferences.samples import SAMPLES_FILE, SampleTable, table_samples
from toolkit.preferences.single_rows import list_rows
from toolkit.preferences.stored import StoredRows
from toolkit.preferences.tables import from_parquet
from toolkit.preferences.views import RowsAt
from toolkit.progress import Reporter
from toolkit.storage.lazy import Computed
from toolkit.storage.spilled import Spill


@dataclass(frozen=True)
class Answered:
    """A prompt with its responses, and their true rewards where the data has them.

    ``source_row`` is the row of the data where the prompt first appears, from 1; 0 where it is in none.
    """

    prompt: Prompt
    responses: list[str]
    gold: list[float] | None = None
    group: str = ""
    source_row: int = 0


def has_responses(selection: PromptSelection) -> bool:
    """Whether the data has responses to its prompts. Raises DataError for a source that cannot be read."""
    path = local_path(selection.data)
    if _samples_file(path) is not None:
        return True
    if path.suffix.lower() == ".txt":
        return False
    loaded = load(selection.data, split=selection.split, config=None, revision=None)
    return _recognised(loaded) or _unlabelled(loaded) is not None


def read_responses(selection: PromptSelection, reporter: Reporter | None = None) -> Sequence[Answered]:
    """The prompts and responses of preference data, whose own labels are not read; of rows with a prompt and a list
    ``responses``; or of all policies in a run folder's ``samples.parquet``. They wait on disk. The reporter says which
    rows of preference data are left out.

    Raises DataError where the data is none of these.
    """
    file = _samples_file(local_path(selection.data))
    if file is not None:
        return _of_samples(file)[: selection.limit]
    return Computed(_rows(selection, reporter), _answered)


def _rows(selection: PromptSelection, reporter: Reporter | None) -> Sequence[PreferenceRow]:
    rows: StoredRows | None = None
    if local_path(selection.data).suffix.lower() != ".txt":
        loaded = load(selection.data, split=selection.split, config=None, revision=None)
        if not _recognised(loaded) and (unlabelled := _unlabelled(loaded)) is not None:
            rows = _of_rows(loaded, unlabelled)
    if rows is None:
        preferences = read_preferences(selection.data, split=selection.split)
        say_left_out(selection.data, preferences.report, reporter)
        rows = preferences.rows
    if selection.limit is None:
        return rows
    return RowsAt(rows, sorted(splits.limit_order(rows, selection.limit, selection.seed)[: selection.limit]))


def say_left_out(data: str, report: DataReport, reporter: Reporter | None) -> None:
    """Show in one line what the reader of the data left out."""
    left_out = report.left_out()
    if reporter is not None and left_out:
        reporter.line(f"{data}: {left_out}")


def _answered(row: PreferenceRow) -> Answered:
    return Answered(row.prompt, row.responses, row.gold, row.group, row.source_row)


def _samples_file(path: Path) -> Path | None:
    file = path / SAMPLES_FILE if path.is_dir() else path
    return file if file.name == SAMPLES_FILE and file.is_file() else None


def _recognised(loaded: SourceRecords) -> bool:
    columns = _columns(loaded)
    return formats.recognise(columns.names, columns.sample) is not None


def _unlabelled(loaded: SourceRecords) -> Format | None:
    return list_rows(_columns(loaded))


def _columns(loaded: SourceRecords) -> Columns:
    return Columns(column_names(loaded), [record for _, record in loaded.records[:SAMPLE]])


def _of_rows(loaded: SourceRecords, unlabelled: Format) -> StoredRows:
    """Rows of a prompt and ``responses`` without labels; rows of one prompt are merged."""
    records, keys = Spill(), array("q")
    for number, record in loaded.records:
        try:
            prompt, responses, *_, group, _ = parse_record(unlabelled, record)
        except RecordError as error:
            raise refused(loaded, number, error) from error
        check_unicode(loaded, number, prompt_texts(prompt), "prompt")
        check_unicode(loaded, number, responses, "responses")
        records.append((prompt, responses, number, group))
        keys.append(hash(canonical_prompt(prompt)))
    rows = StoredRows()
    for places in equals(np.frombuffer(keys, np.int64)):
        of_prompt = [records[place] for place in places.tolist()]
        prompt, _, number, group = of_prompt[0]
        groups = [record[3] for record in of_prompt]
        if (k := odd_one(groups)) is not None:
            raise refused(loaded, of_prompt[k][2], two_groups(groups[k], group))
        responses = [text for record in of_prompt for text in record[1]]
        rows.add(PreferenceRow(prompt_id(prompt), prompt, responses, [], None, number, group), [])
    return rows


def _of_samples(file: Path) -> Sequence[Answered]:
    samples = SampleTable(table_samples(file, ["prompt_id", "prompt", "response"]))
    groups: dict[str, array[int]] = {}  # the places of the samples of each prompt
    for place, sample in enumerate(samples):
        groups.setdefault(sample.prompt_id, array("q")).append(place)
    asked_of = prompts_of_run(file, groups, lambda key: samples[groups[key][0]].prompt)

    def answered(key: str) -> Answered:
        (prompt, group), places = asked_of(key), groups[key]
        texts = [samples[place].response for place in places]
        return Answered(prompt, texts, group=group, source_row=places[0] + 1)

    return Computed(list(groups), answered)


def prompts_of_run(
    file: Path, ids: Container[str], shown: Callable[[str], Prompt]
) -> Callable[[str], tuple[Prompt, str]]:
    """The prompt of each id of a run's samples, and its group ("" for none).

    ``samples.parquet`` shows conversations as text and names no groups; the run's own data has both, where it is there.
    ``shown`` gives a prompt as the samples have it.
    """
    held_out = file.parent / "data" / "eval.parquet"
    if not held_out.is_file():
        return lambda key: (shown(key), "")
    stored, places = Spill(), dict[str, int]()
    for row in from_parquet(held_out):
        if row.prompt_id in ids:
            places[row.prompt_id] = stored.append((row.prompt, row.group))

    def asked(key: str) -> tuple[Prompt, str]:
        if key not in places:
            return shown(key), ""
        prompt, group = stored[places[key]]
        return prompt, group

    return asked
