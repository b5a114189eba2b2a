"""Rows are written and read back as they were; prompts have one canonical form."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.preference_files import conversations, quick, read_records, texts

from toolkit.errors import DataError
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import (
    Comparison,
    PreferenceRow,
    canonical_prompt,
    prompt_id,
    row_to_dict,
    write_native,
)
from toolkit.preferences.splits import labelled_pairs, margins, pairs
from toolkit.preferences.tables import from_parquet, to_parquet


@st.composite
def preference_rows(draw: st.DrawFn) -> list[PreferenceRow]:
    """Rows of distinct prompts, all plain or all messages, with comparisons of several annotators."""
    kind = draw(st.sampled_from([texts, conversations(texts)]))
    prompts = draw(st.lists(kind, min_size=1, max_size=4, unique_by=canonical_prompt))
    rows = []
    for k, prompt in enumerate(prompts, start=1):
        responses = draw(st.lists(texts, min_size=2, max_size=5, unique=True))
        n = len(responses)
        ends = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] != e[1])
        weight = st.floats(1e-3, 10, allow_nan=False)
        one = st.builds(lambda e, w, a: Comparison(*e, w, a), ends, weight, st.sampled_from(["", "ann", "bob"]))
        gold = draw(st.none() | st.lists(st.floats(-9, 9), min_size=n, max_size=n))
        comparisons, group = draw(st.lists(one, max_size=6)), draw(st.sampled_from(["", "a", "template 2"]))
        rows.append(PreferenceRow(prompt_id(prompt), prompt, responses, comparisons, gold, k, group))
    return rows


@quick
@given(preference_rows())
def test_native_and_parquet_round_trips_are_exact(tmp_path: Path, rows: list[PreferenceRow]) -> None:
    write_native(rows, tmp_path / "rows.jsonl.gz")
    to_parquet(rows, tmp_path / "rows.parquet")
    assert from_parquet(tmp_path / "rows.parquet") == rows
    for name in ("rows.jsonl.gz", "rows.parquet"):
        data = read_preferences(str(tmp_path / name))
        assert data.rows == rows
        assert data.report.n_prompts == data.report.n_rows_read == len(rows)
        assert data.report.n_responses == sum(len(row.responses) for row in rows)
        assert data.report.n_comparisons == sum(len(labelled_pairs(row.comparisons)) for row in rows)
        assert data.report.conversational == isinstance(rows[0].prompt, list)


@quick
@given(preference_rows())
def test_native_csv_and_plain_parquet_read_the_same(tmp_path: Path, rows: list[PreferenceRow]) -> None:
    records = [row_to_dict(row) | {"gold": row.gold, "group": row.group} for row in rows]
    for ending in (".csv", ".parquet"):
        csv_records = [{**r, "gold": r["gold"] if r["gold"] is not None else ""} for r in records]
        assert read_records(tmp_path, csv_records if ending == ".csv" else records, ending).rows == rows


def test_native_bytes_depend_on_the_rows_alone(tmp_path: Path) -> None:
    rows = [PreferenceRow(prompt_id("p"), "p", ["a", "é"], [Comparison(0, 1)], [1.0, 2.0], 1)]
    write_native(rows, tmp_path / "a.jsonl.gz")
    write_native(rows, tmp_path / "b.jsonl.gz")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert (tmp_path / "a.jsonl.gz").read_bytes()[3:8] == bytes(5)  # RFC 1952: no file name, and no time
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).count(b"\n") == 1
    first = read_preferences(str(tmp_path / "a.jsonl.gz")).fingerprint
    write_native([*rows, PreferenceRow(prompt_id("q"), "q", ["a", "b"], [])], tmp_path / "b.jsonl.gz")
    assert read_preferences(str(tmp_path / "b.jsonl.gz")).fingerprint != first


def test_every_format_may_name_groups_and_a_prompt_has_one(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    data = read_records(
        tmp_path, [{**pair, "group": 7}, {**pair, "prompt": "q", "group": "x"}, {**pair, "prompt": "r"}]
    )
    assert [row.group for row in data.rows] == ["7", "x", ""]
    assert data.report.n_groups == 2 and "group" not in data.report.ignored_columns
    with pytest.raises(DataError, match=r"group 'y' here and 'x' earlier.*\n.*line 2, column 'group'"):
        read_records(tmp_path, [{**pair, "group": "x"}, {**pair, "chosen": "c", "group": "y"}])
    with pytest.raises(DataError, match="'group' is a list"):
        read_records(tmp_path, [{**pair, "group": ["x"]}])


@given(texts | conversations(texts))
def test_canonical_prompt_is_sorted_compact_json(prompt: Any) -> None:
    assert canonical_prompt(prompt) == json.dumps(prompt, sort_keys=True, separators=(",", ":"))


def test_prompt_id_is_pinned() -> None:  # printf '"Why?"' | sha256sum
    assert prompt_id("Why?") == "499f097cf704535e"
    assert prompt_id([{"content": "Why?", "role": "user"}]) == prompt_id([{"role": "user", "content": "Why?"}])


def test_margins_are_read_kept_and_averaged(tmp_path: Path) -> None:
    [row] = read_records(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5}]).rows
    assert row.comparisons == [Comparison(0, 1, margin=1.5)]
    native = {"prompt": "p", "responses": ["a", "b", "c"]}
    comparisons = [
        {"winner": 2, "loser": 0, "margin": 3},
        {"winner": 0, "loser": 2, "weight": 2},
        {"winner": 0, "loser": 1},
    ]
    [row] = read_records(tmp_path, [{**native, "comparisons": comparisons}]).rows
    assert margins(row) == [0.0, 1.0] and [pair[:2] for pair in pairs(row)] == [(0, 1), (0, 2)]
    write_native([row], tmp_path / "rows.jsonl.gz")
    assert read_preferences(str(tmp_path / "rows.jsonl.gz")).rows == [row]
    to_parquet([row], tmp_path / "rows.parquet")
    assert from_parquet(tmp_path / "rows.parquet") == [row]
    with pytest.raises(DataError, match="margin -1.0 is negative"):
        read_records(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}])


def test_a_written_set_makes_its_folder(tmp_path):
    rows = [PreferenceRow("", "Film was", [" good", " bad"], [Comparison(0, 1)])]
    write_native(rows, tmp_path / "new" / "rows.jsonl.gz")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.jsonl.gz"]
