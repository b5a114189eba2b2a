"""Labelled solutions of prompts: what they share, the sides that they are on, and their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.files import write_row_groups
from toolkit.preferences import splits
from toolkit.preferences.loading import parquet_rows
from toolkit.preferences.rows import Prompt, prompt_id
from toolkit.storage.integrity import refuse_changed


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
    group_of = {solution.prompt_id: solution.group for solution in solutions}
    is_out = {
        **dict.fromkeys((name for name, _ in train), False),
        **dict.fromkeys((name for name, _ in held_out), True),
    }
    # Of prompts in both, the group counts that either names. True, the later of equal ones, is held out.
    named = [*train, *held_out, *((name, group) for name, group in group_of.items() if name in is_out)]
    group_is_out = dict(sorted((group, is_out[name]) for name, group in named if group))
    others = [(name, group) for name, group in group_of.items() if name not in is_out]
    is_out |= {name: group_is_out[group] for name, group in others if group in group_is_out}
    free = [(name, group) for name, group in others if group not in group_is_out]
    _, chosen = splits.split_places(free, eval_fraction, seed)
    is_out |= {free[k][0]: True for k in chosen}
    sides: tuple[list[Solution], list[Solution]] = [], []
    for solution in solutions:
        sides[is_out.get(solution.prompt_id, False)].append(solution)
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
