"""Some rows of many, without copies of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar, cast

from toolkit.preferences.rows import PreferenceRow, Prompt
from toolkit.storage.lazy import LazySequence

Item = TypeVar("Item")


def first_responses(row: PreferenceRow, n: int) -> PreferenceRow:
    """The row with its first ``n`` responses and the comparisons between them."""
    comparisons = [c for c in row.comparisons if max(c.winner, c.loser) < n]
    gold = row.gold[:n] if row.gold is not None else None
    return replace(row, responses=row.responses[:n], comparisons=comparisons, gold=gold)


class Rows(LazySequence[PreferenceRow]):
    """Rows that are made anew each time that they are asked for."""

    @abstractmethod
    def prompt(self, at: int) -> Prompt:
        """The prompt of a row, without the rest of it."""

    @abstractmethod
    def prompt_id(self, at: int) -> str: ...

    def part(self, places: range) -> Rows:
        return RowsAt(self, places)


def prompt_of(rows: Sequence[PreferenceRow], at: int) -> Prompt:
    return rows.prompt(at) if isinstance(rows, Rows) else rows[at].prompt


def prompt_id_of(rows: Sequence[PreferenceRow], at: int) -> str:
    return rows.prompt_id(at) if isinstance(rows, Rows) else rows[at].prompt_id


@dataclass(frozen=True)
class RowsAt(Rows):
    """The rows at these places of others, each with its first ``max_responses`` responses at most (None: all).

    >>> rows = [PreferenceRow(name, "", ["x", "y"], []) for name in "abc"]
    >>> [row.prompt_id for row in RowsAt(rows, [2, 0])], RowsAt(rows, [1], max_responses=1)[0].responses
    (['c', 'a'], ['x'])
    """

    rows: Sequence[PreferenceRow]
    places: Sequence[int]
    max_responses: int | None = None

    def __len__(self) -> int:
        return len(self.places)

    def item(self, at: int) -> PreferenceRow:
        row = self.rows[self.places[at]]
        if self.max_responses is not None and len(row.responses) > self.max_responses:
            return first_responses(row, self.max_responses)
        return row

    def prompt(self, at: int) -> Prompt:
        return prompt_of(self.rows, self.places[at])

    def prompt_id(self, at: int) -> str:
        return prompt_id_of(self.rows, self.places[at])


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items, ``size`` at a time.

    >>> list(chunks("abc", 2))
    [['a', 'b'], ['c']]
    """
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Items, of which a thread makes the next one while the caller works on one.

    >>> list(one_ahead(k * k for k in range(3)))
    [0, 1, 4]
    """
    remaining, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, remaining, end)
        while (item := waiting.result()) is not end:
            waiting = thread.submit(next, remaining, end)
            yield cast(Item, item)
