"""Results: mappings of numbers that cannot be changed, show themselves as tables, and become data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from toolkit.errors import DataError
from toolkit.report.sheets import Sheet, html_of, text_of

if TYPE_CHECKING:
    import pandas as pd


class Result(dict[str, Any]):
    """A mapping of numbers that is shown as tables: as HTML in a notebook, as text where it is printed.

    It is read as the dict that it is (``result["win_rates"]``) or by attributes (``result.win_rates``), and cannot be
    changed: ``dict(result)`` is a copy that can. ``sheets`` are its tables, ``sentence`` is what it says in words.
    """

    def __init__(
        self, values: Mapping[str, Any], sheets: Sequence[Sheet], sentence: str = "", *, main: str = ""
    ) -> None:
        super().__init__(values)
        sheets = sheets or ([_numbers(self)] if self else [])
        for name, value in (("sheets", tuple(sheets)), ("sentence", sentence), ("_main_table", main)):
            object.__setattr__(self, name, value)

    sheets: tuple[Sheet, ...]
    sentence: str
    _main_table: str

    def to_frame(self, name: str = "") -> pd.DataFrame:
        """A table of the result as a ``pandas.DataFrame``: the rows of the list ``name``, with nested names dotted.

        Without a name it is the main table, such as the policies of a run or the win rates of a comparison. A result
        that holds no table is one row.

        Raises:
            DataError: no table has this name.
        """
        import pandas as pd

        tables = [key for key, value in self.items() if _is_table(value)]
        key = name or (self._main_table if self._main_table in tables else "")
        if not key:
            plain = {key: value for key, value in self.items() if not isinstance(value, list)}
            return pd.json_normalize(plain)
        if key not in tables:
            fix = f"the tables are {', '.join(tables)}" if tables else "call to_frame() for its numbers"
            raise DataError(f"the result has no table {name!r}", where="to_frame", fix=fix)
        return pd.json_normalize(self[key])

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the result has no {name!r}; it has {', '.join(self)}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def _repr_html_(self) -> str:
        return html_of(*self.sheets, sentence=self.sentence)

    def __str__(self) -> str:
        return "\n\n".join(filter(None, [text_of(*self.sheets), self.sentence]))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (dict(self), self.sheets, self.sentence, self._main_table)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a result cannot be changed; dict(result) is a copy that can")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    update = pop = popitem = clear = setdefault = _refuse


def _again(values: dict[str, Any], sheets: Sequence[Sheet], sentence: str, main: str) -> Result:
    return Result(values, sheets, sentence, main=main)


def _numbers(values: Mapping[str, Any]) -> Sheet:
    """The numbers and texts of a result that has no tables of its own."""
    sheet = Sheet("Result", ["", "value"])
    for name, value in values.items():
        if isinstance(value, str | int | float | None):
            sheet.add_row(name.replace("_", " "), "-" if value is None else str(value))
    return sheet


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)
