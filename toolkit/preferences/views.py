"""Some rows of many, without copies of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar, overload

from toolkit.preferences.rows import PreferenceRow

Item = TypeVar("Item")


def first_responses(row: PreferenceRow, n: int) -> PreferenceRow:
    """The row with its first ``n`` responses and the comparisons between them."""
    comparisons = [c for c in row.comparisons if max(c.winner, c.loser) < n]
    gold = row.gold[:n] if row.gold is not None else None
    return replace(row, responses=row.responses[:n], comparisons=comparisons, gold=gold)


@dataclass(frozen=True)
class RowsAt(Sequence[PreferenceRow]):
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

    @overload
    def __getitem__(self, at: int) -> PreferenceRow: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[PreferenceRow]: ...
    def __getitem__(self, at: int | slice) -> PreferenceRow | Sequence[PreferenceRow]:
        if isinstance(at, slice):
            return replace(self, places=self.places[at])
        row = self.rows[self.places[at]]
        if self.max_responses is not None and len(row.responses) > self.max_responses:
            return first_responses(row, self.max_responses)
        return row

    def __iter__(self) -> Iterator[PreferenceRow]:
        return (self[k] for k in range(len(self)))


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items, ``size`` at a time.

    >>> list(chunks("abc", 2))
    [['a', 'b'], ['c']]
    """
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
