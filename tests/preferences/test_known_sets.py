"""Published data sets and other trainers' formats are read by their columns, without a mapping."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.known_sets import BAD, GOOD, KNOWN_SETS, OTHER_DATA, QUESTIONS, SYSTEM, KnownSet
from support.preference_files import read_records
from support.running import duel

from toolkit.errors import DataError
from toolkit.measure.check.rows import SourceOptions, read_rows
from toolkit.measure.filter import FilterOptions, filter_rows
from toolkit.measure.options import ScoringOptions
from toolkit.measure.reading import ReadingOptions, read
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.columns import is_known_column
from toolkit.preferences.formats import recognise
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import PreferenceRow, canonical_prompt
from toolkit.preferences.splits import pairs
from toolkit.progress import Reporter

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
JUDGE = "def size(prompts, completions, **_):\n    return list(map(len, completions))\n"
QUIET = Reporter(quiet=True)
every_set = pytest.mark.parametrize("name", KNOWN_SETS)


@pytest.fixture
def file(tmp_path: Path, name: str) -> str:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in KNOWN_SETS[name].records))
    return str(path)


def last_turn(row: PreferenceRow) -> str:
    return row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]


def check_rows(known: KnownSet, rows: list[PreferenceRow]) -> None:
    wins = {QUESTIONS[k]: p for k, p in enumerate(known.wins) if p is not None}
    assert [last_turn(row) for row in rows] == list(wins)
    for row in rows:
        k = QUESTIONS.index(last_turn(row))
        [p] = {
            pair.p if row.responses[pair.i] == GOOD[k] else 1 - pair.p
            for pair in pairs(row)
            if {row.responses[pair.i], row.responses[pair.j]} == {GOOD[k], BAD[k]} or "Nectar" in str(row.prompt)
        } or {pairs(row)[0].p}
        assert p == wins[QUESTIONS[k]]
        if known.conversational:
            assert isinstance(row.prompt, list)
            assert (row.prompt[0] == {"role": "system", "content": SYSTEM}) == known.system
            assert row.prompt[-1]["role"] == "user"


@every_set
@pytest.mark.parametrize("ending", [".jsonl", ".json.gz", ".csv", ".parquet"])
def test_read_without_a_mapping(tmp_path: Path, name: str, ending: str) -> None:
    known = KNOWN_SETS[name]
    assert len(known.records) == 5
    data = read_records(tmp_path, known.records, ending)
    assert (data.report.format, data.report.conversational) == (known.format, known.conversational)
    assert data.report.unseen == {}
    check_rows(known, data.rows)
    assert all(map(is_known_column, recognised_columns(known)))  # so that each of them can be mapped


def recognised_columns(known: KnownSet) -> frozenset[str]:
    recognised = recognise(known.records[0], known.records)
    assert recognised is not None
    return recognised.columns


@every_set
def test_check_score_and_rewards_read_the_same_rows(name: str, file: str) -> None:
    known, data = KNOWN_SETS[name], read_preferences(file)
    expected, expected_report = data.rows, data.report
    checked = read_rows(file, SourceOptions(), None, None)
    by_prompt: dict[str, list[str]] = {}
    for row in checked.rows:
        by_prompt.setdefault(canonical_prompt(row.prompt), []).extend(row.responses)
    assert list(by_prompt.values()) == [row.responses for row in expected]
    tokenizer: Any = load_tokenizer(resolve("tiny"))
    if known.conversational:
        tokenizer.chat_template = CHATML
    for compared, n_single in ((True, 0), (False, expected_report.n_single)):
        rows = [row.row for row in read(file, tokenizer, "tiny", ReadingOptions(), compared=compared).rows]
        assert [row for row in rows if len(row.responses) > 1] == expected
        assert len(rows) == len(expected) + n_single


@every_set
def test_filter_scores_every_row(name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "known_judge.py").write_text(
        "def size(prompts, completions, **_):\n    return list(map(len, completions))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    labels = tmp_path / "labels.jsonl"
    prompts: list[Any] = [f"Question {k}?" for k in range(1, 45)]
    if KNOWN_SETS[name].conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    labelled = [{"prompt": p, "response": "x" * k, "label": k > 39} for k, p in enumerate(prompts, start=1)]
    labels.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    out = tmp_path / "out.jsonl"
    options = FilterOptions(str(labels), 0.2)
    summary = filter_rows("python:known_judge:size", file, options, ScoringOptions(), out=out, reporter=QUIET)
    assert summary["n_kept"] + summary["n_dropped"] == 5
    assert summary["n_unscored"] == sum(p is None for p in KNOWN_SETS[name].wins)


def test_columns_that_the_docs_name_can_be_mapped() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    table = page[page.index("## Formats that are read as they come") : page.index("## Data sets by name")]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")]
    labels = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = {name for cell in [*cells, *labels] for name in re.findall(r"`(\w+)`", cell)}
    inside = {"answer", "rank", "overall_score"}  # of the objects in a list
    assert {"margin", "score_a", "annotator2", "preference_strength"} <= names
    assert {name for name in names - inside if not is_known_column(name)} <= {"A", "b", "tie", "model_a"}  # labels


def test_the_docs_have_a_row_for_each_set() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    table = page[page.index("## Data sets by name") : page.index("## Name your columns")]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == list(KNOWN_SETS)
    assert all(len(row) == 3 and row[1] for row in rows)


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_is_told_apart(tmp_path: Path, name: str) -> None:
    records, words = OTHER_DATA[name]
    with pytest.raises(DataError) as caught:
        read_records(tmp_path, records)
    assert words in caught.value.fix


def test_columns_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    records = [
        {"post": f"Why {k}?", "reply_x": f"So {k}.", "reply_y": f"No {k}.", "verdict": k % 2, "tags": ["a"]}
        for k in range(6)
    ]
    with pytest.raises(DataError) as caught:
        read_records(tmp_path, records)
    assert "The prompt and the responses could be 'post', 'reply_x', 'reply_y'." in caught.value.fix
    assert "The label could be 'verdict'" in caught.value.fix
    assert "did you mean" not in caught.value.fix
    columns = {"prompt": "post", "response_a": "reply_x", "response_b": "reply_y"}
    data = read_records(tmp_path, records, columns={**columns, "probability": "verdict"})
    assert [pairs(row)[0].p for row in data.rows] == [0.0, 1.0] * 3
    data = read_records(tmp_path, records, columns={**columns, "choice": "verdict"})
    assert [pairs(row)[0].p for row in data.rows] == [1.0, 0.0] * 3


def test_labels_of_0_and_1_name_both_readings(tmp_path: Path) -> None:
    records = [{"prompt": f"Q{k}", "response_a": "a", "response_b": "b", "label": k % 2} for k in range(8)]
    with pytest.raises(DataError) as caught:
        read_records(tmp_path, records)
    assert "{choice: label}" in caught.value.fix and "{probability: label}" in caught.value.fix


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"preference_strength": 7}, "no strength of a preference"),
        ({"label": -2}, "preference_strength"),
        ({"winner_model_a": 1, "winner_model_b": 1, "winner_tie": 0}, "more than one of winner_model_a"),
    ],
)
def test_verdicts_out_of_range(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_records(tmp_path, [{"prompt": "Q", "response_a": "a", "response_b": "b", **record}])
    assert words in caught.value.render()


def test_one_hot_columns_without_a_1_are_unlabelled(tmp_path: Path) -> None:
    columns = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0}
    row = {"prompt": "Q", "response_a": "a", "response_b": "b", **columns}
    data = read_records(tmp_path, [row, {**row, "winner_model_b": True}])
    assert data.report.n_unlabelled == 1
    assert [(pair.i, pair.j, pair.p) for pair in pairs(data.rows[0])] == [(0, 1, 0.0)]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_one_hot_columns_of_words(tmp_path: Path, ending: str) -> None:
    """A table writes booleans as True and False."""
    wins = [("True", "False", "False"), ("false", "true", "false"), ("0.0", "0", "1.0"), ("", "", "")]
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    records = [
        {"prompt": f"Q{k}", "response_a": "a", "response_b": "b", **dict(zip(names, of, strict=True))}
        for k, of in enumerate(wins)
    ]
    data = read_records(tmp_path, records, ending)
    assert [[pair.p for pair in pairs(row)] for row in data.rows] == [[1.0], [0.0], [0.5], []]
    assert data.report.n_unlabelled == 1


def test_a_ranking_of_words_is_one_of_numbers(tmp_path: Path) -> None:
    record = {"prompt": "Q", "responses": ["a", "b", "c"], "ranking": ["2", "0", "1"]}
    [row] = read_records(tmp_path, [record]).rows
    assert row == read_records(tmp_path, [{**record, "ranking": [2, 0, 1]}]).rows[0]


def test_margins_of_labelled_and_scored_pairs(tmp_path: Path) -> None:
    pair = {"response_a": "a", "response_b": "b", "margin": 0.5}
    records = [{"prompt": f"Q{k}", **pair, "label": label} for k, label in enumerate(("A", "B", "tie", 1.25))]
    data = read_records(tmp_path, records)
    assert [[c.margin for c in row.comparisons] for row in data.rows] == [[0.5], [0.5], [0, 0], [0, 0]]
    assert data.rows[1].comparisons[0][:2] == (1, 0) and data.report.ignored_columns == ()
    scored = read_records(tmp_path, [{"prompt": "Q", **pair, "score_a": 1, "score_b": 3}])
    assert [c.margin for c in scored.rows[0].comparisons] == [0.5]
    signed = [  # the first score minus the second; that of a tie or without a label is not read
        {"prompt": f"S{k}", **pair, "score_a": a, "score_b": 2, "margin": margin}
        for k, (a, margin) in enumerate([(1, -1.0), (5, 3.0), (2, "none"), (None, -9)])
    ]
    rows = read_records(tmp_path, signed).rows
    assert [[(c.winner, c.margin) for c in row.comparisons] for row in rows] == [
        [(1, 1.0)], [(0, 3.0)], [(0, 0), (1, 0)], [],
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"(?s)margin -1.0 says that the second response is better.*column 'margin'"):
        read_records(tmp_path, [{**signed[0], "score_a": 3}])
    listed = {"prompt": "Q", "responses": ["a", "b", "c"], "scores": [1, 2, 3], "margin": 0.5}
    report = read_records(tmp_path, [listed]).report  # whose margin it is nobody can say
    assert report.warnings() == ["columns that are not read: 'margin'"]


# ------------------------------------------------------------------------------------------------- system and history
def test_a_system_column_stays_unread_with_plain_text(tmp_path: Path) -> None:
    records = KNOWN_SETS["Intel/orca_dpo_pairs"].records
    data = read_records(tmp_path, records, conversational=False)
    assert [row.prompt for row in data.rows] == list(QUESTIONS)
    assert data.report.unseen == {"column 'system'": 5}


def test_a_system_column_without_text_changes_nothing(tmp_path: Path) -> None:
    records = [{**record, "system": system} for record, system in zip(
        KNOWN_SETS["Intel/orca_dpo_pairs"].records, ["", None, " ", "", None], strict=True
    )]  # fmt: skip
    assert not read_records(tmp_path, records).report.conversational
    first = read_records(tmp_path, [{**records[0], "system": "Be kind."}, *records[1:]]).rows
    assert [len(row.prompt) for row in first] == [2, 1, 1, 1, 1]


def test_a_system_column_beside_messages(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    record = {"prompt": turns, "chosen": [{"role": "assistant", "content": "So."}], "system": "Be kind."}
    record["rejected"] = [{"role": "assistant", "content": "No."}]
    assert read_records(tmp_path, [record]).rows[0].prompt == turns
    assert read_records(tmp_path, [{**record, "prompt": turns[1:]}]).rows[0].prompt == turns
    with pytest.raises(DataError, match="another system message"):
        read_records(tmp_path, [{**record, "system": "Be harsh."}])


def test_earlier_turns_in_a_column_of_their_own(tmp_path: Path) -> None:
    record = {"instruction": "And beans?", "input": "", "chosen": "Soak them.", "rejected": "No."}
    record = {**record, "history": [["How do I cook rice?", "Boil it."]], "system": "Be kind."}
    row = read_records(tmp_path, [record]).rows[0]
    roles = ["system", "user", "assistant", "user"]
    contents = ["Be kind.", "How do I cook rice?", "Boil it.", "And beans?"]
    assert row.prompt == [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    data = read_records(tmp_path, [record], conversational=False)
    assert data.report.unseen == {"column 'history'": 1, "column 'system'": 1}
    with pytest.raises(DataError, match="history"):
        read_records(tmp_path, [{**record, "history": [["a", "b", "c"]]}])


# ------------------------------------------------------------------------------------------------- one response a row
def test_rows_of_one_response_are_joined_by_their_prompt(tmp_path: Path) -> None:
    rows = [("p", "a", 3), ("q", "x", 1), ("p", "b", 1), ("p", "c", None), ("q", "y", 1), ("r", "z", 4)]
    data = read_records(tmp_path, [dict(zip(("prompt", "response", "score"), row, strict=True)) for row in rows])
    assert [(row.prompt, row.responses, row.source_row) for row in data.rows] == [
        ("p", ["a", "b", "c"], 1),
        ("q", ["x", "y"], 2),
    ]
    assert [[pair[:3] for pair in pairs(row)] for row in data.rows] == [[(0, 1, 1.0)], [(0, 1, 0.5)]]
    assert (data.report.n_single, data.report.single_rows, data.report.n_unlabelled) == (1, (6,), 2)
    assert "1 row left out: no other row has a response to the same prompt (first: 6)" in data.report.warnings()


def test_a_blank_row_of_one_response_leaves_the_others(tmp_path: Path) -> None:
    rows = [("p", "a", 3), ("p", " ", 2), ("p", "b", 1), ("q", "x", 1), ("q", "", 0), ("", "y", 1)]
    records = [dict(zip(("prompt", "response", "score"), row, strict=True)) for row in rows]
    data = read_records(tmp_path, records)
    assert [(row.prompt, row.responses) for row in data.rows] == [("p", ["a", "b"])]
    assert [pair[:3] for pair in pairs(data.rows[0])] == [(0, 1, 1.0)]
    assert (data.report.n_empty, data.report.empty_rows) == (3, (2, 5, 6))
    assert (data.report.n_single, data.report.single_rows) == (1, (4,))
    checked = read_rows(str(tmp_path / "data.jsonl"), SourceOptions(), None, None)
    assert [(row.prompt, row.responses) for row in checked.rows] == [("p", ["a", "b"])]
    assert checked.notes == [
        "3 rows left out: a prompt or response is empty (line 2, 5, 6)",
        "1 row left out: no other row has a response to the same prompt (line 4)",
    ]
    with pytest.raises(DataError, match="no usable row of 3: 2 empty, 1 without another response to their prompt"):
        read_records(tmp_path, records[3:])
    with pytest.raises(DataError, match="no usable row of 2: 2 empty"):
        read_records(tmp_path, [records[1], records[1]])


def test_equal_scores_of_chosen_and_rejected_are_counted(tmp_path: Path) -> None:
    data = read_records(tmp_path, KNOWN_SETS["HuggingFaceH4/ultrafeedback_binarized"].records)
    assert (data.report.n_equal_scores, data.report.n_ties) == (1, 0)


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["nvidia/HelpSteer2", "stanfordnlp/SHP", "allenai/reward-bench-2"])
def test_the_commands_take_them(name: str, file: str, tmp_path: Path) -> None:
    checked = json.loads(duel("check", file, "--model=tiny", "--json").stdout)
    assert checked["n_rows"] == 5
    arguments = ("--policy=tiny", "--reference=none", f"--data={file}", "--json")
    rewards = json.loads(duel("rewards", *arguments, f"--out={tmp_path / 'rewards.parquet'}").stdout)
    n_single = read_preferences(file).report.n_single  # it has a reward, and nothing is compared with it
    assert rewards["n_prompts"] == len(KNOWN_SETS[name].wins) + n_single
