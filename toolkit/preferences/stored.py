"""Preference rows that wait on disk, so that as many as a file holds need little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt
from toolkit.preferences.views import Rows
from toolkit.storage.spilled import Spill


class StoredRows(Rows):
    """Rows in the order in which they were added.

    ``add`` takes the rows of the source as well where each of its responses is first. ``records`` are what the rows of
    the source say, each (row of the source, prompt, responses, comparisons, gold); ``add_record`` takes one of them as
    a row, without a copy.

    >>> rows = StoredRows()
    >>> rows.add(PreferenceRow("0123456789abcdef", "", ["x", "y"], [Comparison(0, 1)]), [1, 3])
    >>> rows[0].comparisons, rows.response_rows(0), list(rows.keys())
    ([Comparison(winner=0, loser=1, weight=1.0, annotator='', margin=0.0)], [1, 3], [('0123456789abcdef', '')])
    """

    def __init__(self, records: Spill | None = None) -> None:
        self._records = records
        self._rows = Spill()  # of rows that are no single record; behind a record's values, the rows of its responses
        self._places = array("q")  # of each row among these; -1 - place among the records
        self._ids = array("Q")  # the 16 hex digits of each
        self._groups: dict[str, int] = {}
        self._names: list[str] = []  # of the groups
        self._group_of = array("q")

    def add(self, row: PreferenceRow, response_rows: Sequence[int]) -> None:
        # JSON of plain tuples takes a third of the time of that of named ones.
        comparisons = list(map(tuple, row.comparisons))
        values = (row.source_row, row.prompt, row.responses, comparisons, row.gold, list(response_rows))
        self._places.append(self._rows.append(values))
        self._add_key(int(row.prompt_id, 16), row.group)

    def add_record(self, prompt_id: int, group: str, record: int) -> None:
        """A row that is what one of the records says: its responses differ, and no other record has its prompt.

        ``prompt_id`` is the number that its 16 hex digits write.
        """
        self._places.append(-1 - record)
        self._add_key(prompt_id, group)

    def _add_key(self, prompt_id: int, group: str) -> None:
        self._ids.append(prompt_id)
        place = self._groups.setdefault(group, len(self._groups))
        if place == len(self._names):
            self._names.append(group)
        self._group_of.append(place)

    def keys(self) -> Iterator[tuple[str, str]]:
        """The id of each row's prompt, and its group, which are in memory."""
        names = self._names
        return ((f"{number:016x}", names[group]) for number, group in zip(self._ids, self._group_of, strict=True))

    @property
    def n_groups(self) -> int:
        """Distinct names of groups."""
        return sum(1 for name in self._groups if name)

    def _values(self, at: int) -> Any:
        place = self._places[at]
        if place >= 0:
            return self._rows[place]
        assert self._records is not None
        return self._records[-1 - place]

    def response_rows(self, at: int) -> list[int]:
        """The row of the source where each response of a row is first."""
        number, _, responses, _, _, *rows = self._values(at)
        return rows[0] if rows else [number] * len(responses)

    def __len__(self) -> int:
        return len(self._places)

    def item(self, at: int) -> PreferenceRow:
        number, prompt, responses, comparisons, gold, *_ = self._values(at)
        judged = [Comparison(*comparison) for comparison in comparisons]
        group = self._names[self._group_of[at]]
        return PreferenceRow(self.prompt_id(at), prompt, responses, judged, gold, number, group)

    def prompt(self, at: int) -> Prompt:
        prompt: Prompt = self._values(at)[1]
        return prompt

    def prompt_id(self, at: int) -> str:
        return f"{self._ids[at]:016x}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(PreferenceRow.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]
