"""Recorded samples come back as they were written, by the columns that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import DataError, StoreError
from toolkit.files import read_table, write_table
from toolkit.preferences.samples import (
    COLUMNS,
    Sample,
    SampleTable,
    by_policy,
    by_prompt,
    places_by_policy,
    read_samples,
    table_samples,
    write_samples,
)

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


def test_samples_on_disk_are_a_sequence_of_equal_samples() -> None:
    samples = [*SAMPLES, Sample("p3", response="\ud800 half", response_ids=[1, 2**40], gold_reward=float("inf"))] * 3
    table = SampleTable(samples)
    assert list(table) == samples and len(table) == 9 and table[-1] == samples[-1]
    assert list(table[1:7:3]) == samples[1:7:3]
    with pytest.raises(IndexError):
        table[9]


def test_policies_have_their_samples_in_the_order_of_drawing() -> None:
    drawn = [Sample("p", "b", sample_index=1), Sample("p", "a"), Sample("q", "b"), Sample("p", "b"), Sample("q", "a")]
    assert places_by_policy(drawn) == {"b": [2, 3, 0], "a": [1, 4]}


def test_a_table_is_read_as_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.files.ROWS_AT_ONCE", 2)
    write_samples(SAMPLES * 3, tmp_path / "samples.parquet")
    rows = table_samples(tmp_path, ("prompt_id", "policy"), optional=("response_ids",))
    assert [next(rows).response_ids, *(sample.response_ids for sample in rows)] == [[5, 2], [6]] * 3
    without = table_samples(tmp_path, ("prompt_id",), optional=("response_ids", "unheard_of"))
    assert next(without) == Sample("p1")
