"""``duel filter``: keep the rows whose response scores above a threshold with a known false-positive rate."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, ModelError, RecipeError
from toolkit.evals.filter_threshold import FilterThreshold, filter_threshold
from toolkit.files import (
    atomic_write,
    code_fingerprint,
    fingerprint,
    read_json,
    write_json,
)
from toolkit.judging import scorers
from toolkit.judging.independence import judging_models, seen_in_training
from toolkit.judging.judge import check_judge
from toolkit.judging.options import JudgeOptions
from toolkit.measure.once import once
from toolkit.measure.options import ScoringOptions
from toolkit.models.prompt_kind import trained_on_messages
from toolkit.models.resolve import resolve
from toolkit.preferences.parsing import Datum
from toolkit.preferences.rows import prompt_id
from toolkit.preferences.stream import (
    LABEL,
    RESPONSE_SCORES,
    Chunk,
    RowFile,
    RowReader,
    check_columns,
    group_of,
    join_rows,
    no_column,
    row_file,
    row_reader,
    write_rows,
)
from toolkit.progress import Reporter

# Rows of a chunk: what an interrupted command computes again, at most.
CHUNK = 256
SCORE = "score"
CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class FilterOptions:
    """``calibrate`` are labelled rows, ``fpr`` the target rate as a fraction of one.

    ``columns`` maps the columns of a format, and ``label``, to the names that they have in the data. ``plain`` leaves
    transcripts as text. ``split`` is that of data sets on the hub.
    """

    calibrate: str
    fpr: float
    columns: Mapping[str, str] = field(default_factory=dict)
    plain: bool = False
    split: str = "train"


def dropped_path(out: Path) -> Path:
    """The file of the rows that do not pass.

    >>> dropped_path(Path("a/rows.jsonl.gz")).name, dropped_path(Path("rows.parquet")).name
    ('rows.dropped.jsonl.gz', 'rows.dropped.parquet')
    """
    return out.with_name(f"{_stem(out)}.dropped{out.name.removeprefix(_stem(out))}")


def _stem(out: Path) -> str:
    suffix = next((end for end in (".jsonl", ".jsonl.gz", ".parquet") if out.name.lower().endswith(end)), None)
    if suffix is None or len(out.name) == len(suffix):
        raise RecipeError(
            f"{out.name!r} has an ending that is not known", where="--out", fix=".jsonl, .jsonl.gz or .parquet"
        )
    return out.name[: -len(suffix)]


def summary_path(out: Path) -> Path:
    """The file with the summary."""
    return out.with_name(f"{_stem(out)}.summary.json")


@once(dropped_path, summary_path)
def filter_rows(
    judge: str, data: str, options: FilterOptions, scoring: ScoringOptions, *, out: Path, reporter: Reporter
) -> dict[str, Any]:
    """Write the rows of ``data`` that pass to ``out``, the others beside it, and return the summary.

    ``judge`` scores responses: ``rm:MODEL``, ``implicit:POLICY,REFERENCE``, ``python:MODULE:FUNCTION`` or ``gold``.
    A row of preference data has the score of its preferred response, the one with the most wins net of losses; where
    several are equal, or nothing is compared, that of the best-scoring one. Interrupted, the call continues.

    Raises DataError for data that cannot be read or does not set a threshold, RecipeError for a judge that does not
    score, ModelError for a score that is not finite.
    """
    check_judge(judge)
    dropped = dropped_path(out)
    files = (row_file(data, options.split), row_file(options.calibrate, options.split))
    stream = _Stream(*files, options, out, _trained_on_messages(judge))
    stream.check_names()
    work = out.with_name(f".{out.name}.partial")
    _open_work(work, fingerprint([scorers.judge_identity(judge), stream.identity(), scoring.dtype]))
    scorer = _LazyScorer(judge, JudgeOptions(scoring.model, token_budget=scoring.batch_tokens))
    threshold = _calibrated(stream.labels, options.fpr, scorer, work, reporter)
    reporter.line(f"keep what scores above {threshold.threshold:g}")
    counts = _filter(stream, threshold.threshold, scorer, work, reporter)
    summary = threshold.as_dict() | counts | {"judge": judge, "out": str(out), "dropped": str(dropped)}
    summary["preference_data"] = stream.reader.is_preference
    summary["n_trained_prompts"] = seen_in_training(judging_models(judge), _calibration(work)["prompt_ids"])
    parts = sorted(work.glob("part-*.counts"))
    write_json(summary_path(out), summary)
    for kind, path in (("dropped", dropped), ("kept", out)):
        with atomic_write(path) as partial:
            join_rows([part.with_suffix(f".{kind}") for part in parts], partial, path.name)
    shutil.rmtree(work)
    return summary


class _Stream:
    """The files of one call and how they are read."""

    def __init__(
        self, data: RowFile, calibration: RowFile, options: FilterOptions, out: Path, trained: bool | None
    ) -> None:
        self.data, self.calibration = data, calibration
        self.options, self.out = options, out
        self.reader, self.labels = (self._reader(file, trained) for file in (data, calibration))
        further: set[str] = set()
        if not self.labels.is_preference:
            names = {str(name) for record in calibration.sample() for name in record}
            if LABEL not in self.labels.columns and LABEL not in names:
                raise no_column(calibration, LABEL, options.columns)
            further.add(LABEL)
        check_columns(options.columns, [self.reader, self.labels], further)

    def _reader(self, file: RowFile, trained: bool | None) -> RowReader:
        """Reads prompts of the kind that the judge was ``trained`` on, as :func:`toolkit.measure.reading.read_data`."""
        columns = self.options.columns
        reader = row_reader(file, columns, conversational=False if self.options.plain else trained or None)
        if trained is False and reader.conversational and reader.recognised.name.endswith("transcripts"):
            return row_reader(file, columns, conversational=False)
        return reader

    def identity(self) -> list[Any]:
        """What the result depends on beside the judge."""
        files = [file.identity() for file in (self.data, self.calibration)]
        settings = [self.options.fpr, dict(self.options.columns), self.options.plain, self.out.suffix]
        return [*files, *settings, code_fingerprint("toolkit.measure.filter")]

    def check_names(self) -> None:
        """Raises RecipeError for an ``out`` of another format, DataError for data that has the new columns."""
        if self.data.is_parquet != self.out.name.lower().endswith(".parquet"):
            kind = ".parquet" if self.data.is_parquet else ".jsonl or .jsonl.gz"
            raise RecipeError(f"{self.out.name!r} is of another format than the data", where="--out", fix=kind)
        taken = {SCORE, RESPONSE_SCORES} & {str(name) for record in self.data.sample() for name in record}
        if taken:
            raise DataError(
                f"the data has a column {min(taken)!r}, which is the name of a column to write",
                where=str(self.data.path),
                fix="rename or remove it",
            )


def _trained_on_messages(judge: str) -> bool | None:
    """What :func:`trained_on_messages` says of a judge's reward model or policy; None for other judges."""
    kind, _, rest = judge.partition(":")
    if kind not in ("rm", "implicit"):
        return None
    return trained_on_messages(resolve(rest.partition(",")[0].strip() if kind == "implicit" else rest))


class _LazyScorer:
    """A judge whose models are loaded when it is first asked. Prompts are all text or all messages."""

    def __init__(self, judge: str, options: JudgeOptions) -> None:
        self.judge, self.options = judge, options
        self.scorer: scorers.Scorer | None = None
        self.is_text: bool | None = None

    def __call__(self, file: RowFile, numbers: Sequence[int], data: Sequence[Datum]) -> list[list[float]]:
        """The scores of each row's responses. Raises ModelError for one that is not finite, with its row."""
        if not data:
            return []
        for number, datum in zip(numbers, data, strict=True):
            if self.is_text is None:
                self.is_text = isinstance(datum.prompt, str)
            if self.is_text != isinstance(datum.prompt, str):
                raise DataError(
                    "prompts are partly text, partly messages, in the data or in the calibration set",
                    where=file.place(number),
                    fix="use one kind; --plain reads transcripts as text",
                )
        if self.scorer is None:
            self.scorer = scorers.scorer(self.judge, data[0].prompt, self.options)
        scores = self.scorer([datum.prompt for datum in data], [datum.responses for datum in data])
        for number, values in zip(numbers, scores, strict=True):
            if not all(map(math.isfinite, values)):
                raise ModelError(
                    f"the score is {next(value for value in values if not math.isfinite(value))}",
                    where=f"{file.place(number)}, judge {self.judge}",
                    fix="mend the judge, or leave the row out",
                )
        return scores


def _open_work(work: Path, key: str) -> None:
    """The folder of what is computed so far; results of another call are removed."""
    state = work / "key.json"
    if state.is_file() and read_json(state).get("key") == key:
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(state, {"key": key})


# ---------------------------------------------------------------- calibration


def _calibrated(reader: RowReader, fpr: float, scorer: _LazyScorer, work: Path, reporter: Reporter) -> FilterThreshold:
    """The threshold; the scores behind it are kept for a call that continues."""
    stored = work / CALIBRATION
    if not stored.is_file():
        write_json(stored, _scored_labels(reader, scorer, reporter))
    known = _calibration(work)
    return filter_threshold(known["scores"], known["good"], known["groups"], fpr)


def _calibration(work: Path) -> dict[str, Any]:
    """What ``_scored_labels`` gave."""
    return dict(read_json(work / CALIBRATION))


def _scored_labels(reader: RowReader, scorer: _LazyScorer, reporter: Reporter) -> dict[str, list[Any]]:
    """``scores``, labels (``good``) and ``groups`` of the labelled responses, and the ``prompt_ids`` of all prompts.

    Of preference data those that win more than they lose are good, those that lose more are bad; the others are left
    out, and so are rows that cannot be scored.
    """
    file = reader.file
    scores, good, groups, ids = list[float](), list[bool](), list[str](), dict[str, None]()
    with reporter.task("calibrate", file.n_rows()) as task:
        for chunk in file.chunks(CHUNK):
            numbers, data = _read(reader, chunk)
            values = scorer(file, numbers, data)
            for number, datum, of_row in zip(numbers, data, values, strict=True):
                labels = (
                    _net_wins(datum)
                    if reader.is_preference
                    else [1.0 if reader.label(number, chunk.records[number - chunk.first]) else -1.0]
                )
                for net, score in zip(labels, of_row, strict=True):
                    if net:
                        scores.append(score)
                        good.append(net > 0)
                        groups.append(group_of(datum))
                        ids[prompt_id(datum.prompt)] = None
            task.advance(len(chunk.records))
    return {"scores": scores, "good": good, "groups": groups, "prompt_ids": list(ids)}


def _net_wins(datum: Datum) -> list[float]:
    """For each response the weight of its wins less that of its losses."""
    net = [0.0] * len(datum.responses)
    for comparison in datum.comparisons:
        net[comparison.winner] += comparison.weight
        net[comparison.loser] -= comparison.weight
    return net


def _read(reader: RowReader, chunk: Chunk) -> tuple[list[int], list[Datum]]:
    """The rows of a chunk that can be scored, with their numbers."""
    numbered = [(number, reader.read(number, record)) for number, record in enumerate(chunk.records, chunk.first)]
    rows = [(number, datum) for number, datum in numbered if datum is not None]
    return [number for number, _ in rows], [datum for _, datum in rows]


# ---------------------------------------------------------------- the stream


def _filter(stream: _Stream, threshold: float, scorer: _LazyScorer, work: Path, reporter: Reporter) -> dict[str, int]:
    """Write each chunk's rows as two files, and last what they count: chunks with counts are not computed again."""
    total = {"n_kept": 0, "n_dropped": 0, "n_unscored": 0}
    with reporter.task("filter", stream.data.n_rows()) as task:
        for number, chunk in enumerate(stream.data.chunks(CHUNK)):
            part = work / f"part-{number:08}.counts"
            if part.is_file():
                task.resume_at(task.done + len(chunk.records))
            else:
                write_json(part, _filter_chunk(stream, chunk, threshold, scorer, part))
                task.advance(len(chunk.records))
            counts = read_json(part)
            total = {name: value + counts[name] for name, value in total.items()}
    return total


def _filter_chunk(stream: _Stream, chunk: Chunk, threshold: float, scorer: _LazyScorer, part: Path) -> dict[str, int]:
    numbers, data = _read(stream.reader, chunk)
    scores: list[float | None] = [None] * len(chunk.records)
    of_responses: list[list[float] | None] = [None] * len(chunk.records)
    for number, datum, values in zip(numbers, data, scorer(stream.data, numbers, data), strict=True):
        net = _net_wins(datum)
        scores[number - chunk.first] = max(value for value, wins in zip(values, net, strict=True) if wins == max(net))
        of_responses[number - chunk.first] = values
    columns: dict[str, Sequence[Any]] = {SCORE: scores}
    if stream.reader.is_preference:
        columns[RESPONSE_SCORES] = of_responses
    kept = [k for k, score in enumerate(scores) if score is not None and score > threshold]
    dropped = sorted(set(range(len(scores))) - set(kept))
    write_rows(chunk, kept, columns, part.with_suffix(".kept"))
    write_rows(chunk, dropped, columns, part.with_suffix(".dropped"))
    return {"n_kept": len(kept), "n_dropped": len(dropped), "n_unscored": scores.count(None)}
