"""Solutions in steps with a label for each step: what a process reward model learns from.

These layouts are read: TRL's stepwise format (``prompt, completions, labels``; the second is called ``steps`` as well),
PRM800K's table of candidates for a next step (``instruction, responses, next_response, rating``), its original records
(``question, label``), and Math-Shepherd's marked texts (``input, label``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path

from toolkit.errors import DataError
from toolkit.preferences.cells import RecordError, cell, excerpt, name_cell, prompt_cell, type_name
from toolkit.preferences.columns import GROUP
from toolkit.preferences.loading import SourceRecords, load, local_path, read_file
from toolkit.preferences.reading import column_names
from toolkit.preferences.refusals import check_unicode, in_words, prompt_texts, row_error
from toolkit.preferences.rows import Prompt, Record, canonical_prompt, prompt_id
from toolkit.preferences.solutions import Solution, with_shared
from toolkit.preferences.step_layouts import (
    MARK,
    RATINGS,
    UnclearRecordError,
    marked_steps,
    nested_candidates,
    step_texts,
    table_candidates,
)

PROMPTS = ("prompt", "question", "problem", "instruction")
STEPS = ("completions", "steps")
STEPWISE = "stepwise (prompt, completions or steps, labels)"
PRM800K = "PRM800K (instruction, responses, next_response, rating)"
PRM800K_NESTED = "PRM800K's original records (question.problem, label.steps)"
MATH_SHEPHERD = f"Math-Shepherd (input with {MARK} behind each step, label with + or - in these places)"
ROWS_THAT_TELL = 20
LAYOUTS = (STEPWISE, PRM800K, PRM800K_NESTED, MATH_SHEPHERD)


@dataclass(frozen=True)
class StepReport:
    """Counts of what was read. Steps and labels are counted once where solutions share them."""

    source: str
    format: str
    n_rows_read: int
    n_prompts: int
    n_solutions: int
    n_steps: int
    n_right: int  # neutral ratings are among them
    n_wrong: int
    n_neutral: int
    n_unlabelled: int
    n_duplicates: int  # solutions equal to an earlier one, or to its beginning; they are left out
    n_contradictions: int  # steps with another label than the same step, behind the same steps, had before
    n_unclear: int = 0  # rows that do not say where their first step begins, or which candidate others follow

    def warnings(self) -> list[str]:
        """One sentence for each count that a user should know of."""
        n_labelled = self.n_right + self.n_wrong
        sentences = {
            f"{self.n_neutral:,} of {n_labelled:,} labelled steps are rated neutral and count as right": self.n_neutral,
            f"{self.n_unlabelled:,} steps have no label: they are read, and neither train nor test": self.n_unlabelled,
            f"{self.n_duplicates:,} solutions say nothing that an earlier one does not: they are left out": (
                self.n_duplicates
            ),
            f"{self.n_contradictions:,} steps are labelled both right and wrong": self.n_contradictions,
            f"{self.n_unclear:,} rows do not say where the first step begins, or what a step follows: they are left "
            "out": self.n_unclear,
        }
        return [sentence for sentence, n in sentences.items() if n]


@dataclass(frozen=True)
class StepData:
    """Solutions, a report of what was read, and a hash of the content."""

    solutions: list[Solution]
    report: StepReport
    fingerprint: str


def shipped_steps() -> dict[str, Path]:
    """Names of the step data inside this package, each with its file."""
    folder = resources.files("toolkit.preferences") / "assets" / "steps"
    return {
        item.name.removesuffix(".jsonl.gz"): Path(str(item))
        for item in folder.iterdir()
        if item.name.endswith(".jsonl.gz")
    }


def step_source_path(source: str) -> Path:
    """The file or folder of step data with this name."""
    return shipped_steps().get(source) or local_path(source)


def read_steps(source: str, *, split: str = "train") -> StepData:
    """Read step data: a shipped name, a file, a folder of ``datasets``, or a hub id.

    Solutions of one prompt that begin with the same steps and labels share these (:class:`Solution`).

    Raises:
        DataError: no such source, another layout, steps without labels, as many labels as there are no steps, a label
            that is none, an empty step, no label at all, texts and conversations in one data set, or two groups of one
            prompt. It names the row.
    """
    shipped = shipped_steps().get(source)
    loaded = (
        replace(read_file(shipped), name=source) if shipped else load(source, split=split, config=None, revision=None)
    )
    if not loaded.records:
        raise DataError("the step data is empty", where=loaded.name)
    names = set(column_names(loaded))
    layout = _layout(loaded, names)
    n_neutral = n_unclear = 0
    if layout == STEPWISE:
        solutions = _stepwise(loaded, names)
    elif layout == MATH_SHEPHERD:
        solutions, n_unclear = _math_shepherd(loaded)
    else:
        solutions, n_neutral, n_unclear = _prm800k(loaded, names, layout)
    _check_one_kind(loaded, solutions)
    _check_groups(loaded, solutions)
    solutions, n_duplicates, n_contradictions = with_shared(solutions)
    counted = [solution.labels[k] for solution in solutions for k in solution.counted]
    report = StepReport(
        source=loaded.name,
        format=layout,
        n_rows_read=len(loaded.records),
        n_prompts=len({solution.prompt_id for solution in solutions}),
        n_solutions=len(solutions),
        n_steps=sum(len(solution.steps) - solution.n_shared for solution in solutions),
        n_right=counted.count(True),
        n_wrong=counted.count(False),
        n_neutral=n_neutral,
        n_unlabelled=sum(len(solution.steps) - solution.n_shared - len(solution.counted) for solution in solutions),
        n_duplicates=n_duplicates,
        n_contradictions=n_contradictions,
        n_unclear=n_unclear,
    )
    if not counted:
        raise DataError("no step has a label", where=loaded.name, fix="a label is true or false; null is none")
    return StepData(solutions, report, loaded.fingerprint or _hash(solutions))


def _hash(solutions: Iterable[Solution]) -> str:
    lines = (json.dumps(asdict(solution), sort_keys=True) for solution in solutions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _layout(loaded: SourceRecords, names: set[str]) -> str:
    """The layout by its columns, and where these are common names by the cells of the first rows."""
    first = [record for _, record in loaded.records[:ROWS_THAT_TELL]]
    if {"instruction", "responses", "next_response"} <= names:
        return PRM800K
    if {"question", "label"} <= names and any(isinstance(record.get("label"), Mapping) for record in first):
        return PRM800K_NESTED
    if {"input", "label"} <= names and any(MARK in str(record.get("input")) for record in first):
        return MATH_SHEPHERD
    return STEPWISE


# ---------------------------------------------------------------------------------------------------- TRL's layout
def _stepwise(loaded: SourceRecords, names: set[str]) -> list[Solution]:
    prompts = next((name for name in PROMPTS if name in names), None)
    steps = next((name for name in STEPS if name in names), None)
    if prompts is None or steps is None:
        raise DataError(
            f"not a known layout of step data: its columns are {in_words(column_names(loaded))}",
            where=loaded.name,
            fix=f"known layouts: {'; '.join(LAYOUTS)}",
        )
    if "labels" not in names:
        raise DataError(
            "the steps have no labels: there is no column 'labels'",
            where=loaded.name,
            fix="a list for each row, true or false for each of its steps",
        )
    solutions = []
    for number, record in loaded.records:
        try:
            solution = _stepwise_record(record, prompts, steps)
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        _check_texts(loaded, number, solution)
        solutions.append(replace(solution, source_row=number))
    return solutions


def _stepwise_record(record: Record, prompts: str, column: str) -> Solution:
    prompt = prompt_cell(record, (prompts,))
    steps = step_texts(record, column)
    labels = cell(record, "labels")
    if labels is None:
        fix = "true or false for each of its steps, null for one that nobody judged"
        raise RecordError("the row has steps and no labels", column="labels", fix=fix)
    if not isinstance(labels, list):
        fix = "one label for each step, such as [true, false]"
        raise RecordError(f"'labels' is {type_name(labels)}, expected a list", column="labels", fix=fix)
    if len(labels) != len(steps):
        raise RecordError(
            f"{len(steps)} steps have {len(labels)} labels", column="labels", fix="one label for each step"
        )
    if not steps:
        raise RecordError("the row has no steps", column=column, fix="leave the row out")
    read = [_label(value, k) for k, value in enumerate(labels, start=1)]
    return Solution(prompt_id(prompt), prompt, steps, read, group=name_cell(record, GROUP))


def _label(value: object, number: int) -> bool | None:
    """True, False, 1 or 0; None for null."""
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        fix = "true or 1 for a right step, false or 0 for a wrong one, null for one that nobody judged"
        raise RecordError(f"the label of step {number} is {excerpt(value)}", column="labels", fix=fix)
    return bool(value)


# ---------------------------------------------------------------------------------------------------- PRM800K's layout
@dataclass
class _Problem:
    """The candidates of one prompt: the labels of the paths of steps, each with its group and its row."""

    prompt: Prompt
    label: dict[tuple[str, ...], bool | None] = field(default_factory=dict)
    group: dict[tuple[str, ...], str] = field(default_factory=dict)
    row: dict[tuple[str, ...], int] = field(default_factory=dict)


def _prm800k(loaded: SourceRecords, names: set[str], layout: str) -> tuple[list[Solution], int, int]:
    """Every path of steps that no other path goes on from. A step has the rating that it got as a candidate.

    Also the number of neutral ratings, and of rows that are left out.
    """
    if layout == PRM800K and "rating" not in names:
        fix = "the column 'rating': 1, 0 or -1"
        raise DataError("the steps have no labels: there is no column 'rating'", where=loaded.name, fix=fix)
    candidates_of = table_candidates if layout == PRM800K else nested_candidates
    problems: dict[str, _Problem] = {}
    n_neutral = n_unclear = 0
    for number, record in loaded.records:
        try:
            candidates, group = candidates_of(record), name_cell(record, GROUP)
        except UnclearRecordError:
            n_unclear += 1
            continue
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        for prompt, steps, rating in candidates:
            _check_texts(loaded, number, Solution("", prompt, steps, [None] * len(steps)))
            problem = problems.setdefault(canonical_prompt(prompt), _Problem(prompt))
            path = tuple(step.strip() for step in steps)
            if problem.label.get(path) is None:  # the first rating of a candidate that several people saw
                problem.label[path] = None if rating is None else RATINGS[rating]
                n_neutral += rating == 0
            problem.row.setdefault(path, number)
            problem.group.setdefault(path, group)
    return [solution for problem in problems.values() for solution in _paths(problem)], n_neutral, n_unclear


def _paths(problem: _Problem) -> list[Solution]:
    """The longest path first, so that others share its steps and not the other way round."""
    beginnings = {path[:n] for path in problem.label for n in range(1, len(path))}
    ends = sorted(
        (path for path in problem.label if path not in beginnings), key=lambda path: (-len(path), problem.row[path])
    )
    return [
        Solution(
            prompt_id(problem.prompt),
            problem.prompt,
            list(path),
            [problem.label.get(path[: k + 1]) for k in range(len(path))],
            source_row=problem.row[path],
            group=problem.group[path],
        )
        for path in ends
    ]


# ---------------------------------------------------------------------------------------------------- Math-Shepherd
def _math_shepherd(loaded: SourceRecords) -> tuple[list[Solution], int]:
    """A solution of each row, and the number of rows that are left out."""
    solutions, n_unclear = [], 0
    for number, record in loaded.records:
        try:
            prompt, steps, labels = marked_steps(record)
            group = name_cell(record, GROUP)
        except UnclearRecordError:
            n_unclear += 1
            continue
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        solution = Solution(prompt_id(prompt), prompt, steps, labels, source_row=number, group=group)
        _check_texts(loaded, number, solution)
        solutions.append(solution)
    return solutions, n_unclear


# ---------------------------------------------------------------------------------------------------- checks
def _check_texts(loaded: SourceRecords, number: int, solution: Solution) -> None:
    """Raises DataError for an empty prompt or step, and for text that no tokenizer takes."""
    texts = prompt_texts(solution.prompt)
    if not texts or not texts[-1].strip():
        raise row_error(loaded, number, "the prompt is empty", fix="leave the row out")
    for k, step in enumerate(solution.steps, start=1):
        if not step.strip():
            raise row_error(
                loaded, number, f"step {k} of {len(solution.steps)} is empty", fix="leave out the step and its label"
            )
    check_unicode(loaded, number, texts, "prompt")
    check_unicode(loaded, number, solution.steps, "steps")


def _check_one_kind(loaded: SourceRecords, solutions: Iterable[Solution]) -> None:
    first: dict[bool, int] = {}
    for solution in solutions:
        first.setdefault(isinstance(solution.prompt, list), solution.source_row)
    if len(first) == 2:
        what = f"{loaded.unit} {first[True]} holds chat messages, {loaded.unit} {first[False]} holds plain text"
        raise DataError(f"conversational and plain prompts in one data set: {what}", where=loaded.name)


def _check_groups(loaded: SourceRecords, solutions: Iterable[Solution]) -> None:
    first: dict[str, str] = {}
    for solution in solutions:
        earlier = first.setdefault(solution.prompt_id, solution.group)
        if earlier != solution.group:
            what = f"group {solution.group!r} here and {earlier!r} in another row of the same prompt"
            raise row_error(loaded, solution.source_row, what, column=GROUP, fix="the same group in all of them")
