"""``leak``: prompts that are nearly the same as a held-out one, or as one that could be held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain

import numpy as np

from toolkit.evals.near_duplicates import near_duplicates
from toolkit.measure.check.findings import Collector, excerpt
from toolkit.measure.check.stored import CheckedRows
from toolkit.preferences.rows import readable


def check_leak(rows: CheckedRows, held_out: CheckedRows | None, unit: str, collector: Collector) -> None:
    """Prompts that are nearly the same as a held-out one; without held-out rows, as one that could be held out."""
    if held_out is None:
        _check_alike(rows, unit, collector)
        return
    held, _ = held_out.first_of_prompts()
    training, prompt_of = rows.first_of_prompts()
    twins = np.full(len(training), -1)  # of each prompt of training, the place of its twin among the held-out ones
    _, twin, twinned = np.intersect1d(held_out.keys[held], rows.keys[training], assume_unique=True, return_indices=True)
    twins[twinned] = twin
    is_same = twins >= 0
    # The held-out texts come first: texts with the same words pair with the first of them.
    for pair in near_duplicates(chain(_prompts(held_out, held), _prompts(rows, training))):
        place = pair.second - len(held)
        if place < 0 or twins[place] >= 0:
            continue
        if pair.first < len(held):
            twins[place] = pair.first
        elif pair.similarity == 1.0:
            twins[place] = twins[pair.first - len(held)]
    for row in np.flatnonzero(twins[prompt_of] >= 0).tolist():
        place = prompt_of[row]
        word, twin = "is also" if is_same[place] else "is nearly", held_out.numbers[held[twins[place]]]
        collector.add(
            "leak", int(rows.numbers[row]), partial(_of_held_out, rows, row, f"{word} that", f"{unit} {twin}")
        )


def _of_held_out(rows: CheckedRows, row: int, word: str, twin: str) -> str:
    return f"the prompt {word} of held-out {twin}: {excerpt(readable(rows.prompt(row)))}"


def _check_alike(rows: CheckedRows, unit: str, collector: Collector) -> None:
    """Prompts that a split by the hash of the prompt can put on different sides."""
    prompts, _ = rows.first_of_prompts()
    groups, numbers = rows.groups[prompts], rows.numbers[prompts]
    for pair in near_duplicates(_prompts(rows, prompts)):
        if groups[pair.first] and groups[pair.first] == groups[pair.second]:
            continue
        for one, other in ((pair.first, pair.second), (pair.second, pair.first)):
            twin = f"{unit} {numbers[other]}"
            detail = partial(_of_another, rows, int(prompts[one]), int(prompts[other]), twin)
            collector.add("leak", int(numbers[one]), detail)


def _of_another(rows: CheckedRows, row: int, other: int, twin: str) -> str:
    one, two = (excerpt(readable(rows.prompt(place))) for place in (row, other))
    return f"a split can separate it from {twin}: {one} and {two}"


def _prompts(rows: CheckedRows, places: Iterable[int]) -> Iterator[str]:
    return (readable(rows.prompt(place)) for place in places)
