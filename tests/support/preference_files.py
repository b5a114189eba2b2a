"""Texts and conversations for hypothesis, and records as a file of every kind."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from toolkit.preferences.reading import PreferenceData, read_preferences

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# any text but lone surrogates (refused: see test_bad_data) and blank ones (left out and counted)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda t: t.strip() != "")
words = st.text("abcdefgh XYZ.,é", min_size=1, max_size=20).map(str.strip).filter(bool)


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    """Alternating turns that begin and end with the user's."""

    def build(contents: list[str]) -> list[dict[str, str]]:
        contents = contents if len(contents) % 2 else contents[:-1]
        return [{"role": ("user", "assistant")[k % 2], "content": c} for k, c in enumerate(contents)]

    return st.lists(content, min_size=1, max_size=5).map(build)


def read_records(folder: Path, records: list[dict[str, Any]], ending: str = ".jsonl", **options: Any) -> PreferenceData:
    """Write the records as a file of this ending and read it."""
    path = folder / f"data{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    elif ending == ".json.gz":
        path.write_bytes(gzip.compress(json.dumps(records).encode()))
    elif ending == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(records[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(
                {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in record.items()} for record in records
            )
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path)
    return read_preferences(str(path), **options)


endings = pytest.mark.parametrize("ending", [".jsonl", ".json.gz", ".csv", ".parquet"])
