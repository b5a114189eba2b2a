"""Solutions in steps with a label for each step: what a process reward model learns from.

These layouts are read: TRL's stepwise format (``prompt, completions, labels``; the second is called ``steps`` as well),
PRM800K's table of candidates for a next step (``instruction, responses, next_response, rating``), its original records
(``question, label``), and Math-Shepherd's marked texts (``input, label``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.files import write_row_groups
from toolkit.preferences import splits
from toolkit.preferences.cells import RecordError, cell, excerpt, name_cell, prompt_cell, type_name
from toolkit.preferences.columns import GROUP
from toolkit.preferences.loading import SourceRecords, load, local_path, parquet_rows, read_file
from toolkit.preferences.reading import column_names
from toolkit.preferences.refusals import check_unicode, in_words, prompt_texts, row_error
from toolkit.preferences.rows import Prompt, Record, canonical_prompt, prompt_id
from toolkit.preferences.step_layouts import (
    MARK,
    RATINGS,
    UnclearRecordError,
    marked_steps,
    nested_candidates,
    step_texts,
    table_candidates,
)
from toolkit.storage.integrity import refuse_changed

PROMPTS = ("prompt", "question", "problem", "instruction")
STEPS = ("completions", "steps")
STEPWISE = "stepwise (prompt, completions or steps, labels)"
PRM800K = "PRM800K (instruction, responses, next_response, rating)"
PRM800K_NESTED = "PRM800K's original records (question.problem, label.steps)"
MATH_SHEPHERD = f"Math-Shepherd (input with {MARK} behind each step, label with + or - in these places)"
ROWS_THAT_TELL = 20
LAYOUTS = (STEPWISE, PRM800K, PRM800K_NESTED, MATH_SHEPHERD)


@dataclass(frozen=True)
class Solution:
    """A prompt and a solution in steps. ``labels[k]`` says whether step k is right; None where nobody judged it.

    The first ``n_shared`` steps are those of an earlier solution of the prompt, with its labels. They count there, and
    not again here. ``source_row`` is the 1-based row (of JSON lines the line) that the solution ends in. Prompts of one
    ``group`` are held out together; "" for a prompt that is a group by itself.
    """

    prompt_id: str
    prompt: Prompt
    steps: list[str]
    labels: list[bool | None]
    n_shared: int = 0
    source_row: int = 0
    group: str = ""

    @property
    def counted(self) -> list[int]:
        """The steps whose labels count here."""
        return [k for k in range(self.n_shared, len(self.steps)) if self.labels[k] is not None]


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


def with_shared(solutions: Iterable[Solution]) -> tuple[list[Solution], int, int]:
    """The solutions with stripped steps and ``n_shared`` set; how many were left out, and how many steps contradict.

    >>> a = Solution("p", "2 + 2 + 2", ["2 + 2 = 4", "4 + 2 = 6"], [True, True])
    >>> b = Solution("p", "2 + 2 + 2", ["2 + 2 = 4", "4 + 2 = 7"], [True, False])
    >>> [s.n_shared for s in with_shared([a, b])[0]], with_shared([a, a])[1]
    ([0, 1], 1)
    """
    # A node is a step behind its path, with its label; node 0 of a prompt is the path without steps.
    nodes: dict[tuple[str, int, str, bool | None], int] = {}
    unshared, n_duplicates, n_contradictions = [], 0, 0
    for solution in solutions:
        steps, node, n_shared, sharing = [step.strip() for step in solution.steps], 0, 0, True
        for step, label in zip(steps, solution.labels, strict=True):
            key = (solution.prompt_id, node, step, label)
            sharing = sharing and key in nodes
            n_shared += sharing
            if label is not None and key not in nodes:
                n_contradictions += (solution.prompt_id, node, step, not label) in nodes
            node = nodes.setdefault(key, len(nodes) + 1)
        if n_shared == len(steps):
            n_duplicates += 1
        else:
            unshared.append(replace(solution, steps=steps, n_shared=n_shared))
    return unshared, n_duplicates, n_contradictions


# ---------------------------------------------------------------------------------------------------- sides
def split_solutions(
    solutions: Sequence[Solution],
    eval_fraction: float,
    seed: int,
    train: Sequence[tuple[str, str]] = (),
    held_out: Sequence[tuple[str, str]] = (),
) -> tuple[list[Solution], list[Solution]]:
    """``(train, eval)`` by whole prompts. ``train`` and ``held_out`` are (prompt_id, group) of the preference data.

    A prompt of the preference data is on the side that it has there, and so is every other one of its group; of a group
    with prompts on both sides the others are held out. What is left is split as preference data is.
    """
    known = [(name, group, is_out) for is_out, keys in ((False, train), (True, held_out)) for name, group in keys]
    groups = {solution.prompt_id: solution.group for solution in solutions}
    is_held_out = {name: is_out for name, _, is_out in known}
    group_is_held_out = dict[str, bool]()
    of_both = [(group, is_held_out[name]) for name, group in groups.items() if name in is_held_out]
    for group, is_out in [*((group, is_out) for _, group, is_out in known), *of_both]:
        if group:
            group_is_held_out[group] = group_is_held_out.get(group, False) or is_out
    free = []
    for name, group in groups.items():
        if name not in is_held_out and group in group_is_held_out:
            is_held_out[name] = group_is_held_out[group]
        elif name not in is_held_out:
            free.append((name, group))
    _, chosen = splits.split_places(free, eval_fraction, seed)
    is_held_out |= {free[k][0]: True for k in chosen}
    sides: tuple[list[Solution], list[Solution]] = [], []
    for solution in solutions:
        sides[is_held_out.get(solution.prompt_id, False)].append(solution)
    return sides


def as_prompts_of(solutions: Sequence[Solution], conversational: bool, source: str) -> list[Solution]:
    """Solutions whose prompts are of one kind with the preference data's: text becomes a user's message there.

    Raises DataError for messages beside preference data that is text.
    """
    if not solutions or isinstance(solutions[0].prompt, list) == conversational:
        return list(solutions)
    if not conversational:
        raise DataError(
            "the prompts of the steps are chat messages, and those of the preference data are text",
            where=source,
            fix="data.conversational: true reads text prompts as messages",
        )
    as_messages = []
    for solution in solutions:
        prompt: Prompt = [{"role": "user", "content": str(solution.prompt)}]
        as_messages.append(replace(solution, prompt_id=prompt_id(prompt), prompt=prompt))
    return as_messages


# ---------------------------------------------------------------------------------------------------- Parquet
def solutions_to_parquet(solutions: Sequence[Solution], path: Path) -> None:
    """Write solutions, the prompt as JSON text; :func:`solutions_from_parquet` gives back equal ones."""
    import pyarrow as pa

    schema = pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("steps", pa.list_(pa.string())),
            ("labels", pa.list_(pa.bool_())),
            ("n_shared", pa.int32()),
            ("source_row", pa.int64()),
            ("group", pa.string()),
        ]
    )
    records: list[Mapping[str, Any]] = [
        {**asdict(solution), "prompt": json.dumps(solution.prompt)} for solution in solutions
    ]
    write_row_groups([records], schema, path)


def solutions_from_parquet(path: Path) -> list[Solution]:
    """Solutions that :func:`solutions_to_parquet` wrote.

    Raises DataError where the file cannot be read, StoreError for one that was changed in its run.
    """
    refuse_changed(path)
    return [Solution(**{**record, "prompt": json.loads(record["prompt"])}) for _, record in parquet_rows(path)]
