"""Tables of text that fit the terminal: a row never wraps.

A table that is too wide is folded. Its headings take several lines, a column that says the same in every row goes into
the title, the other columns go on in a second block below, and long names are shortened, with their full text below.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from toolkit.evals.words import lines_of

NARROWEST = 80
GAP = "  "
SHORTEST = 12  # to what a name may be shortened
INTERVAL = re.compile(r"([\d.]+% )?interval")  # the heading of a column that belongs to the one before it


def terminal_width() -> int:
    """The columns that a row may take: those of the terminal (or ``COLUMNS``), and 80 where there is none."""
    return max(NARROWEST, shutil.get_terminal_size((NARROWEST, 24)).columns)


@dataclass(frozen=True)
class Column:
    """A heading and its cells."""

    heading: str
    cells: tuple[str, ...]

    @property
    def cell_width(self) -> int:
        return max(map(cell_len, self.cells), default=0)

    @property
    def width(self) -> int:
        return max(cell_len(self.heading), self.cell_width)

    @property
    def folded_width(self) -> int:
        """The width where the heading takes as many lines as it has words."""
        return max([self.cell_width, *map(cell_len, _words(self.heading))])


def folded(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], n_keys: int, width: int) -> str:
    """A table whose first ``n_keys`` columns name the row, no wider than ``width``. The first one stands to the left.

    >>> print(folded("T", ["name", "one", "two"], [["a", "11", "222"]], 1, 12))
    T
    name  one
    a      11
    <BLANKLINE>
    name  two
    a     222
    """
    table = [Column(heading, tuple(row[k] for row in rows)) for k, heading in enumerate(columns)]
    if _total(column.width for column in table) <= width:
        return "\n".join([title, *_lines(table, [column.width for column in table])])
    keys, values, constant = table[:1], table[n_keys:], []
    for column in table[1:n_keys]:
        if len(set(column.cells)) == 1 and column.heading:
            constant.append(f"{column.heading} {column.cells[0]}")
        else:
            keys.append(column)
    title = f"{title} ({', '.join(constant)})" if constant else title
    widest = max(map(_folded_width, _groups(values)), default=0)
    room = max(width - min(widest, width // 2) - len(GAP), SHORTEST)
    names = _Names()
    keys = _shortened(keys, room, names)
    rest = width - _folded_width(keys) - len(GAP)
    values = [_shortened([column], rest, names)[0] for column in values]
    blocks = [_block([*keys, *block], width) for block in _blocks(values, rest)] or [_block(keys, width)]
    return "\n".join([title, "\n\n".join(blocks), *names.legend()])


class _Names:
    """Short forms of long cells: a different one for each."""

    def __init__(self) -> None:
        self.full: dict[str, str] = {}

    def short(self, text: str, width: int) -> str:
        """The beginning and the end of a text, and a number where two texts have the same of both."""
        for number in range(1, len(self.full) + 2):
            mark = "..." if number == 1 else f"..{number}.."
            head = (width - len(mark)) // 3
            tail = width - len(mark) - head
            short = set_cell_size(text, head) + mark + _last_cells(text, tail)
            if self.full.setdefault(short, text) == text:
                return short
        raise AssertionError("one number more than there are names")

    def legend(self) -> list[str]:
        return [f"{short} is {full}" for short, full in self.full.items()]


def _last_cells(text: str, width: int) -> str:
    return set_cell_size(text[::-1], width)[::-1]


def _shortened(columns: Sequence[Column], room: int, names: _Names) -> list[Column]:
    """Columns that take at most ``room`` together: the widest ones give way first."""
    limits = [column.folded_width for column in columns]
    while _total(limits) > room and max(limits) > SHORTEST:
        limits[limits.index(max(limits))] -= 1
    return [
        Column(_short_heading(column.heading, limit, names), tuple(_fit(cell, limit, names) for cell in column.cells))
        for column, limit in zip(columns, limits, strict=True)
    ]


def _fit(text: str, limit: int, names: _Names) -> str:
    return text if cell_len(text) <= limit else names.short(text, limit)


def _short_heading(heading: str, limit: int, names: _Names) -> str:
    return heading if all(cell_len(word) <= limit for word in _words(heading)) else names.short(heading, limit)


def _groups(columns: Sequence[Column]) -> list[list[Column]]:
    """Each column with its interval."""
    groups: list[list[Column]] = []
    for column in columns:
        if groups and INTERVAL.fullmatch(column.heading):
            groups[-1].append(column)
        else:
            groups.append([column])
    return groups


def _blocks(columns: Sequence[Column], room: int) -> list[list[Column]]:
    """The columns in as few blocks as the first fit gives; an interval stays with its value where both have room."""
    blocks: list[list[Column]] = []
    for group in _groups(columns):
        together = _folded_width(group) <= room
        for columns_of_block in [group] if together else [[column] for column in group]:
            for block in blocks:
                if _folded_width([*block, *columns_of_block]) <= room:
                    block.extend(columns_of_block)
                    break
            else:
                blocks.append(list(columns_of_block))
    return blocks


def _folded_width(columns: Sequence[Column]) -> int:
    return _total(column.folded_width for column in columns)


def _block(columns: Sequence[Column], width: int) -> str:
    """A block of the table. Where it leaves room, the tallest headings get wider."""
    widths = [column.folded_width for column in columns]
    while True:
        heights = [len(_wrapped(column.heading, wide)) for column, wide in zip(columns, widths, strict=True)]
        k = heights.index(max(heights))
        wider = next(
            (w for w in range(widths[k], columns[k].width + 1) if len(_wrapped(columns[k].heading, w)) < heights[k]),
            None,
        )
        if wider is None or _total(widths) - widths[k] + wider > width:
            return "\n".join(_lines(columns, widths))
        widths[k] = wider


def _lines(columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    """The headings, at the bottom of the lines that they take, and the rows."""
    headings = [_wrapped(column.heading, width) for column, width in zip(columns, widths, strict=True)]
    height = max(map(len, headings))
    head = [[""] * (height - len(lines)) + lines for lines in headings]
    n_rows = len(columns[0].cells)
    rows = [*zip(*head, strict=True), *([column.cells[k] for column in columns] for k in range(n_rows))]
    return [_line(row, widths) for row in rows]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell + " " * (width - cell_len(cell)) if k == 0 else " " * (width - cell_len(cell)) + cell
        for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return GAP.join(padded).rstrip()


def _wrapped(heading: str, width: int) -> list[str]:
    return lines_of(heading, max(width, 1))


def _words(heading: str) -> list[str]:
    return lines_of(heading, 1)


def _total(widths: Iterable[int]) -> int:
    listed = list(widths)
    return sum(listed) + len(GAP) * max(len(listed) - 1, 0)
