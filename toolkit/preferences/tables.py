"""Preference rows as a Parquet table, as the data stage writes them, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.files import write_tables
from toolkit.preferences.loading import PARQUET_KEY, parquet_rows
from toolkit.preferences.rows import Comparison, PreferenceRow
from toolkit.preferences.views import chunks
from toolkit.storage.integrity import refuse_changed

ROWS_AT_ONCE = 1024  # that become a part of a table
ROW_GROUP = 65_536  # rows of a row group of a Parquet file


def to_parquet(rows: Iterable[PreferenceRow], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write rows as they come, the prompt as JSON text; :func:`from_parquet` gives back equal rows.

    ``metadata`` is kept beside the columns.
    """
    import pyarrow as pa

    schema = pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("responses", pa.list_(pa.string())),
            ("comparisons", pa.list_(_comparison_type())),
            ("gold", pa.list_(pa.float64())),
            ("source_row", pa.int64()),
            ("group", pa.string()),
        ],
        metadata={PARQUET_KEY: b"1"} | {key.encode(): value.encode() for key, value in (metadata or {}).items()},
    )
    tables = (_as_table(chunk, schema) for chunk in chunks(rows, ROWS_AT_ONCE))
    write_tables(tables, schema, Path(path), ROW_GROUP)


def _comparison_type() -> Any:
    import pyarrow as pa

    return pa.struct(
        [
            ("winner", pa.int32()),
            ("loser", pa.int32()),
            ("weight", pa.float64()),
            ("annotator", pa.string()),
            ("margin", pa.float64()),
        ]
    )


def _as_table(rows: Sequence[PreferenceRow], schema: Any) -> Any:
    """Rows as a table, made column by column: that takes a fraction of the time of one object for each row."""
    import pyarrow as pa

    comparisons = [c for row in rows for c in row.comparisons]
    fields = _comparison_type()
    values = zip(*comparisons, strict=True) if comparisons else [()] * len(Comparison._fields)
    by_name = dict(zip(Comparison._fields, values, strict=True))
    structs = pa.StructArray.from_arrays([pa.array(by_name[of.name], of.type) for of in fields], fields=list(fields))
    ends = [0, *accumulate(len(row.comparisons) for row in rows)]
    columns = {
        "prompt": [
            encode_basestring_ascii(row.prompt) if isinstance(row.prompt, str) else json.dumps(row.prompt)
            for row in rows
        ],
        "comparisons": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), structs),
    }
    names = [name for name in schema.names if name not in columns]
    columns |= {name: [getattr(row, name) for row in rows] for name in names}
    arrays = [
        column if isinstance(column := columns[of.name], pa.Array) else pa.array(column, of.type) for of in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def from_parquet(path: str | Path) -> list[PreferenceRow]:
    """Rows that :func:`to_parquet` wrote.

    Raises :class:`DataError` for another or a damaged file, StoreError for one that was changed in its run.
    """
    name = str(path)
    refuse_changed(Path(path))
    rows = []
    for _, record in parquet_rows(Path(path)):
        if not {"prompt_id", "prompt", "responses", "comparisons", "gold", "source_row"} <= record.keys():
            fix = "read other Parquet files with read_preferences"
            raise DataError("not a Parquet file of preference rows", where=name, fix=fix)
        comparisons = [Comparison(**comparison) for comparison in record["comparisons"]]
        rows.append(PreferenceRow(**{**record, "comparisons": comparisons}))
    return rows
