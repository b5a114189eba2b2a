"""Lists in the cells of a CSV file: JSON where the column holds lists, and text where it holds text."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from support.preference_files import read_records
from support.running import duel

from toolkit.errors import DataError
from toolkit.preferences.reading import PreferenceData, read_preferences
from toolkit.preferences.rows import Comparison
from toolkit.preferences.splits import pairs

LISTS = [{"prompt": f"p{k}", "chosen": ["a", 'b "c"'], "rejected": ["x", f"y, [{k}]"]} for k in range(3)]
TURNS = [{"role": "user", "content": "It's one"}]
ANSWERS = [{"role": "assistant", "content": text} for text in "ab"]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The values as the csv module writes them: a list as Python does."""
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def refused(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_preferences(str(path), **options)
    return caught.value


def same(first: PreferenceData, second: PreferenceData) -> bool:
    return first.report.format == second.report.format and [
        (row.prompt, row.responses, row.comparisons, row.source_row) for row in first.rows
    ] == [(row.prompt, row.responses, row.comparisons, row.source_row) for row in second.rows]


@pytest.mark.parametrize(
    "records",
    [
        LISTS,
        [{"prompt": "p", "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]}],
        [{"prompt": "p", "responses": ["a", "b", "c"], "preference": [1, 2, 0]}],
        [{"instruction": "q", "chosen": "a", "rejected": "b", "history": turns} for turns in ([], [["x", "y"]])],
        [{"info": {"post": "A post"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}],
        [{"messages": [{"id": 1, **TURNS[0]}], "chosen": "a", "rejected": "b"}],
        [{"messages": TURNS, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}],
        [{"question": {"id": 1, "full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 0}],
    ],
    ids=["chosen and rejected", "answers", "labels", "history", "summaries", "messages", "one message", "objects"],
)
def test_lists_in_csv_are_those_of_json_lines(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    assert same(read_records(tmp_path, records, ".csv"), read_records(tmp_path, records))


def test_columns_with_names_of_their_own(tmp_path: Path) -> None:
    records = [{"prompt": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in LISTS]
    read = read_records(tmp_path, records, ".csv", columns={"chosen": "good", "rejected": "bad"})
    assert same(read, read_records(tmp_path, LISTS))


@pytest.mark.parametrize(
    "texts",
    [
        ("[laughs] No.", "[1, 2]"),
        ('["a"]', "no list"),  # one side alone has a list
        ("[]", '["a"]'),
        ("['a', 'b'] is a list", "['a']"),
        ("[1, 2]", "[3]"),
    ],
)
def test_a_text_that_begins_with_a_bracket_is_a_text(tmp_path: Path, texts: tuple[str, str]) -> None:
    for chosen, rejected in (texts, texts[::-1]):
        [row] = read_preferences(
            str(written(tmp_path / "a.csv", [{"prompt": "[Serious] Why?", "chosen": chosen, "rejected": rejected}]))
        ).rows
        assert (row.prompt, row.responses) == ("[Serious] Why?", [chosen, rejected])


def test_a_row_of_lists_among_texts_is_text(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": '["a"]', "rejected": '["b"]'}]
    rows.append({"prompt": "r", "chosen": "['a']", "rejected": "['b']"})
    read = read_preferences(str(written(tmp_path / "a.csv", rows))).rows
    assert [row.responses for row in read] == [[row["chosen"], row["rejected"]] for row in rows]


def test_a_text_among_lists_is_named(tmp_path: Path) -> None:
    rows = [{name: value if name == "prompt" else json.dumps(value) for name, value in LISTS[0].items()}] * 120
    rows[110] = {**rows[110], "rejected": "a text"}
    error = refused(written(tmp_path / "a.csv", rows))
    assert error.what.startswith("invalid JSON") and error.where.endswith("row 111, column 'rejected'")
    assert "JSON lines or Parquet" in error.fix


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        ([{"prompt": TURNS, "chosen": "a", "rejected": "b"}], "prompt"),
        ([{"chosen": [*TURNS, ANSWERS[0]], "rejected": [*TURNS, ANSWERS[1]]}], "chosen"),
        ([{"messages": "q", "chosen": ANSWERS[0], "rejected": ANSWERS[1]}], "chosen"),
        (LISTS, "chosen"),
        ([{"prompt": "p", "chosen": ["it's"], "rejected": ["a", "b"]}, LISTS[0]], "rejected"),
        ([{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}], "responses"),
        ([{"prompt": "p", "answers": [{"answer": "a", "rank": 1}]}], "answers"),
        ([{"instruction": "q", "chosen": "a", "rejected": "b", "history": h} for h in ([["x", "y"]], [])], "history"),
    ],
)
def test_lists_as_python_writes_them_are_refused(tmp_path: Path, rows: list[dict[str, Any]], column: str) -> None:
    path = written(tmp_path / "a.csv", rows)
    error = refused(path)
    assert error.where == f"{path}, row 1, column {column!r}"
    assert "lists as Python writes them" in error.what or "invalid JSON" in error.what
    assert "JSON lines or Parquet" in error.fix and "pandas" in error.fix


def test_the_command_refuses_what_pandas_wrote(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame([{"prompt": TURNS, "chosen": [ANSWERS[0]], "rejected": [ANSWERS[1]]}])
    frame.to_csv(tmp_path / "a.csv", index=False)
    shown = duel("check", str(tmp_path / "a.csv"), "--model=tiny", check=2).stderr
    assert "as Python writes them" in shown and "row 1, column" in shown and "json.dumps" in shown


def test_margins_and_turns_are_numbers_in_text(tmp_path: Path) -> None:
    records = [{"prompt": f"p{k}", "chosen": "a", "rejected": "b", "margin": m} for k, m in enumerate(("0.5", "", 2))]
    rows = read_records(tmp_path, records, ".csv").rows
    assert [row.comparisons for row in rows] == [[Comparison(0, 1, margin=m)] for m in (0.5, 0.0, 2.0)]
    with pytest.raises(DataError, match="'margin' holds 'large'"):
        read_records(tmp_path, [{**records[0], "margin": "large"}], ".csv")
    asked = [[*TURNS, answer, *TURNS, {"role": "assistant", "content": "same"}] for answer in ANSWERS]
    judged = {"conversation_a": asked[0], "conversation_b": asked[1], "winner": "model_b", "turn": 1}
    [row] = read_records(tmp_path, [judged], ".csv").rows
    assert (row.prompt, row.responses, pairs(row)[0].p) == (TURNS, ["a", "b"], 0.0)


def test_a_margin_in_another_column(tmp_path: Path) -> None:
    record = {"prompt": "p", "chosen": "a", "rejected": "b", "gap": 1.5}
    for ending in (".csv", ".jsonl"):
        [row] = read_records(tmp_path, [record], ending, columns={"margin": "gap"}).rows
        assert row.comparisons == [Comparison(0, 1, margin=1.5)]


@pytest.mark.parametrize(
    "text",
    ["[{'name': 'a', 'v': 1}]", "['x'] good 1 ['y']", '{"role": "admin", "id": 1}', "{'role': 'admin'}", "[{'a': (]"],
)
def test_texts_that_only_look_like_lists_or_messages_stay_texts(tmp_path: Path, text: str) -> None:
    rows = [{"prompt": f"p{k}", "chosen": text, "rejected": f"{text[:-1]} {text[-1]}"} for k in range(3)]
    path = written(tmp_path / "texts.csv", rows)
    assert [row.responses for row in read_preferences(str(path)).rows] == [[r["chosen"], r["rejected"]] for r in rows]
