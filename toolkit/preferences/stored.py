"""Preference rows that wait on disk, so that as many as a file holds need little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt
from toolkit.preferences.views import Rows
from toolkit.storage.spilled import Spill


class StoredRows(Rows):
    """Rows in the order in which they were added. A row is made anew each time that it is asked for.

    ``add`` takes the rows of the source as well where each of its responses is first.

    >>> rows = StoredRows()
    >>> rows.add(PreferenceRow("0123456789abcdef", "", ["x", "y"], [Comparison(0, 1)]), [1, 3])
    >>> rows[0].comparisons, rows.response_rows(0), list(rows.keys())
    ([Comparison(winner=0, loser=1, weight=1.0, annotator='', margin=0.0)], [1, 3], [('0123456789abcdef', '')])
    """

    def __init__(self) -> None:
        self._rows = Spill()
        self._ids = array("Q")  # the 16 hex digits of each
        self._groups: dict[str, int] = {}
        self._group_of = array("q")

    def add(self, row: PreferenceRow, response_rows: Sequence[int]) -> None:
        comparisons = [(c.winner, c.loser, c.weight, c.annotator, c.margin) for c in row.comparisons]
        fields = (row.prompt_id, row.prompt, row.responses, comparisons, row.gold, row.source_row, row.group)
        self._rows.append((*fields, list(response_rows)))
        self._ids.append(int(row.prompt_id, 16))
        self._group_of.append(self._groups.setdefault(row.group, len(self._groups)))

    def keys(self) -> Iterator[tuple[str, str]]:
        """The id of each row's prompt, and its group, which are in memory."""
        names = list(self._groups)
        return ((f"{number:016x}", names[group]) for number, group in zip(self._ids, self._group_of, strict=True))

    @property
    def n_groups(self) -> int:
        """Distinct names of groups."""
        return sum(1 for name in self._groups if name)

    def response_rows(self, at: int) -> list[int]:
        rows: list[int] = self._rows[at][-1]
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, at: int) -> PreferenceRow:
        prompt_id, prompt, responses, comparisons, gold, source_row, group, _ = self._rows[at]
        judged = [Comparison(*comparison) for comparison in comparisons]
        return PreferenceRow(prompt_id, prompt, responses, judged, gold, source_row, group)

    def prompt(self, at: int) -> Prompt:
        prompt: Prompt = self._rows[at][1]
        return prompt

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(PreferenceRow.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]
