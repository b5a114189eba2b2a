"""Recorded samples come back as they were written, by the columns that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import DataError, StoreError
from toolkit.files import read_table, write_table
from toolkit.preferences.samples import COLUMNS, Sample, by_policy, by_prompt, read_samples, write_samples

SAMPLES = [
    Sample("p1", "sft", "sft", "sft", 0, 0, "Is it?", " yes", [5, 2], 2, False, -1.5, 0.0, 0.0, 0.25),
    Sample("p2", "dpo", "dpo", "final", 8, 1, "Is it?", " no", [6], 1, True, -2.0, 0.5, 0.05, -0.25),
]


def test_samples_come_back(tmp_path: Path) -> None:
    write_samples(SAMPLES, tmp_path / "samples.parquet")
    assert read_samples(tmp_path) == read_samples(tmp_path / "samples.parquet") == SAMPLES
    assert [tuple(row) for row in read_table(tmp_path / "samples.parquet")] == [COLUMNS] * 2


def test_columns_that_are_not_asked_for_have_their_default(tmp_path: Path) -> None:
    names = ("prompt_id", "response", "truncated")
    write_samples(SAMPLES, tmp_path / "few.parquet", names)
    assert read_samples(tmp_path / "few.parquet", names) == [
        Sample("p1", response=" yes", truncated=False),
        Sample("p2", response=" no", truncated=True),
    ]
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_samples(tmp_path / "few.parquet", ("prompt_id", "policy"))
    assert "policy" in caught.value.what and "few.parquet" in caught.value.where and "run folder" in caught.value.fix


def test_what_is_no_table_of_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing") as caught:
        read_samples(tmp_path)
    assert caught.value.where == str(tmp_path / "samples.parquet") and caught.value.fix
    (tmp_path / "samples.parquet").write_bytes(b"no table")
    with pytest.raises(StoreError, match="cannot be read") as damaged:
        read_samples(tmp_path, error=StoreError, fix="evaluate again")
    assert damaged.value.fix == "evaluate again"


def test_groups_keep_the_order(tmp_path: Path) -> None:
    several = [*SAMPLES, Sample("p1", "dpo")]
    assert by_policy(several) == {"sft": several[:1], "dpo": several[1:]}
    assert by_prompt(several) == {"p1": [several[0], several[2]], "p2": [several[1]]}


def test_a_table_without_rows_comes_back(tmp_path: Path) -> None:
    write_samples([], tmp_path / "none.parquet")
    assert read_samples(tmp_path / "none.parquet") == []
    write_table([{"a": 1}, {"b": [2]}], tmp_path / "any.parquet")
    assert read_table(tmp_path / "any.parquet", ["b"]) == [{"b": None}, {"b": [2]}]
