"""``duel rewards --shift``: the same comparisons in another form, made here or brought by the user."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError, RecipeError, nearest
from toolkit.evals.shifts import Scored, shift_accuracy
from toolkit.measure.reading import DATA, UNENDED, EncodedRow, EncodedRows, Reading, ReadingOptions, read
from toolkit.models.encoding import Encoded
from toolkit.preferences.loading import load
from toolkit.preferences.rows import Comparison as Preference
from toolkit.progress import Reporter

Rewards = Sequence[NDArray[np.float64]]
COURTESY = "\n\nI hope this helps! Please let me know if you have any other questions."


def _list_items(text: str) -> str:
    """Each sentence as an item of a list."""
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if sentence]
    return "\n" + "\n".join(f"- {sentence}" for sentence in sentences)


def _without_end(text: str) -> str:
    """The first two thirds of the words, at least one."""
    words = re.findall(r"\s*\S+", text)
    return "".join(words[: max(1, len(words) * 2 // 3)])


TEXT_SHIFTS: dict[str, Callable[[str], str]] = {
    "case": str.upper,
    "whitespace": lambda text: re.sub(r" ", "  ", text),
    "list": _list_items,
    "courtesy": lambda text: text + COURTESY,
    "truncated": _without_end,
}
SWAPPED = "swapped"
BUILT_IN = (*TEXT_SHIFTS, SWAPPED)


@dataclass(frozen=True)
class Shift:
    """Shifted rows with their comparisons; ``units[p]`` is the prompt of the data that row p belongs to.

    ``paired_by`` says how that is known: by "prompt", or by "row". None where the rows are not the data's.
    """

    name: str
    rows: Sequence[EncodedRow]
    units: list[str]
    paired_by: str | None


def shifts_of(
    specs: Sequence[str], reading: Reading, tokenizer: Any, policy: str, options: ReadingOptions, reporter: Reporter
) -> list[Shift]:
    """The shifts that ``--shift`` names, each NAME:FILE or one of ``BUILT_IN``. The reporter says how a file is paired.

    Raises RecipeError for a name that is not known or that comes twice, DataError for a file that cannot be read, or
    for "swapped" without samples whose gold reward is known.
    """
    shifts = []
    for spec in specs:
        name, colon, file = spec.partition(":")
        if colon:
            if not (name and file):
                raise RecipeError(f"{spec!r} is not NAME:FILE", where="--shift")
            shifts.append(_of_file(name, file, reading, tokenizer, policy, options, reporter))
        elif name in TEXT_SHIFTS:
            shifts.append(_of_text(name, reading, options.max_response_tokens))
        elif name == SWAPPED:
            shifts.append(_of_samples(reading))
        else:
            fix = f"NAME:FILE, or one that is built in; {nearest(name, BUILT_IN)}"
            raise RecipeError(f"no shift is called {name!r}", where="--shift", fix=fix)
    names = [shift.name for shift in shifts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"two shifts are called {twice!r}", where="--shift", fix="give each another name")
    return shifts


def _of_text(name: str, reading: Reading, max_response_tokens: int) -> Shift:
    """The data's responses, each changed in the same way."""

    def changed(row: EncodedRow) -> EncodedRow:
        texts = [TEXT_SHIFTS[name](text) for text in row.row.responses]
        origin = DATA
        if name == "truncated":  # without an end of text: that is what tells a model
            origin, cut = UNENDED, [True] * len(texts)
            tree = reading.encoder.encode_samples(row.row.prompt, texts, cut, max_response_tokens)
            encoded = Encoded(tree, cut)
        else:
            encoded = reading.encoder.encode(row.row.prompt, texts, max_response_tokens)
        return EncodedRow(replace(row.row, responses=texts), encoded, origin, row.writers, row.sources)

    rows = EncodedRows.of(map(changed, reading.rows[: reading.n_data]))
    return Shift(name, rows, [row.row.prompt_id for row in rows], "prompt")


def _of_samples(reading: Reading) -> Shift:
    """What policies wrote in the place of the data's responses, compared by their gold rewards."""
    compared = (
        replace(row, row=replace(row.row, comparisons=_by_gold(row.row.gold)))
        for row in reading.rows
        if row.origin != DATA and row.row.gold is not None
    )
    rows = EncodedRows.of(row for row in compared if row.row.comparisons)
    if not rows:
        raise DataError(
            "there are no samples with different gold rewards to swap in",
            where="--shift swapped",
            fix="name with --samples the samples.parquet of a run whose gold reward is known",
        )
    return Shift(SWAPPED, rows, [row.row.prompt_id for row in rows], "prompt")


def _by_gold(gold: Sequence[float]) -> list[Preference]:
    n = range(len(gold))
    return [Preference(i, j) for i in n for j in n if gold[i] > gold[j]]


def _of_file(
    name: str, file: str, reading: Reading, tokenizer: Any, policy: str, options: ReadingOptions, reporter: Reporter
) -> Shift:
    """The user's rows. They are paired with the data's by prompt, else by row where both files have as many, else not.

    The reporter says which.
    """
    rows = read(file, tokenizer, policy, replace(options, limit=None)).rows
    n_rows, data = len(rows), reading.rows[: reading.n_data]
    by_prompt = {row.row.prompt_id for row in data}
    by_row = {row.row.source_row: row.row.prompt_id for row in data}
    paired_by: str | None = None
    if any(row.row.prompt_id in by_prompt for row in rows):
        paired_by = "prompt"
        rows = EncodedRows.of(row for row in rows if row.row.prompt_id in by_prompt)
        units = [row.row.prompt_id for row in rows]
    elif set(by_row) <= {row.row.source_row for row in rows} and _as_many(file, data[0].sources[0][0], options.split):
        paired_by = "row"
        rows = EncodedRows.of(row for row in rows if row.row.source_row in by_row)
        units = [by_row[row.row.source_row] for row in rows]
    else:
        rows = rows[: options.limit]
        units = [f"{name} {row.row.prompt_id}" for row in rows]
    if not any(row.row.comparisons for row in rows):
        raise DataError("no row has a comparison", where=file, fix="name preference data with labels")
    how = f"paired with the data by {paired_by}" if paired_by else "not paired with the data, whose prompts are others"
    left_out = f"; {n_rows - len(rows):,} are left out" if len(rows) < n_rows else ""
    reporter.line(f"shift {name}: {len(rows):,} prompts, {how}{left_out}")
    return Shift(name, rows, units, paired_by)


def _as_many(file: str, data: str, split: str) -> bool:
    """Whether two sources have as many rows."""
    one, other = (load(source, split=split, config=None, revision=None).records for source in (file, data))
    return len(one) == len(other)


def together(shifts: Sequence[Shift], reading: Reading) -> Reading:
    """All shifted rows as one reading, to be scored in one pass of each model."""
    return replace(reading, rows=EncodedRows.of(row for shift in shifts for row in shift.rows), counts={})


def shift_rows(
    shifts: Sequence[Shift],
    reading: Reading,
    data_rewards: tuple[Rewards, Rewards | None],
    shifted_rewards: tuple[Rewards, Rewards | None],
) -> list[dict[str, Any]]:
    """A row for each shift (:func:`toolkit.evals.shifts.shift_accuracy`), with ``paired_by``.

    Rewards are (implicit, explicit or None).
    """
    n = reading.n_data
    implicit, explicit = data_rewards
    units = [row.row.prompt_id for row in reading.rows[:n]]
    data = Scored(units, reading.comparisons, implicit[:n], explicit[:n] if explicit is not None else None)
    out, start = [], 0
    for shift in shifts:
        part = slice(start, start + len(shift.rows))
        start = part.stop
        implicit, explicit = shifted_rewards
        comparisons = replace(reading, rows=shift.rows).comparisons
        scores = implicit[part], explicit[part] if explicit is not None else None
        row = shift_accuracy(shift.name, data, Scored(shift.units, comparisons, *scores))
        out.append({**row, "paired_by": shift.paired_by})
    return out
