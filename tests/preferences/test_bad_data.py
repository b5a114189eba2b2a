"""Wrong data is refused with what is wrong, where (file, row, column) and the likely fix; never a traceback."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import DataError
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.tables import from_parquet, to_parquet

pytestmark = pytest.mark.fault

REAL = os.environ.get("DUEL_REAL_DATA")
GOOD = {"prompt": "p", "chosen": "x", "rejected": "y"}
CHAT = [{"role": "user", "content": "q"}]
CHATS = {name: [*CHAT, {"role": "assistant", "content": text}] for name, text in (("chosen", "x"), ("rejected", "y"))}
NATIVE = {"prompt": "p", "responses": ["x", "y"], "comparisons": []}
PAIR = {"prompt": "p", "output_1": "x", "output_2": "y"}


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def refused(path: Path, content: bytes, **options: Any) -> DataError:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_preferences(str(path), **options)
    return caught.value


def compare(winner: Any, loser: Any, **more: Any) -> dict[str, Any]:
    return NATIVE | {"comparisons": [{"winner": winner, "loser": loser, **more}]}


# (records, what the message says, where it points): the wrong record is number 3 after two good ones
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "number for text": (GOOD, GOOD | {"chosen": 5}, "'chosen' is a number (5), expected text", "chosen"),
    "object for text": (GOOD, GOOD | {"rejected": {"a": 1}}, "'rejected' is an object", "rejected"),
    "list of texts": (GOOD, GOOD | {"prompt": ["a"]}, "prompt[1] is text, expected a message", "prompt"),
    "missing column": (GOOD, {"prompt": "p", "choosen": "x", "rejected": "y"}, "no column 'chosen'", "chosen"),
    "message without content": (
        CHATS,
        {"chosen": [{"role": "user"}], "rejected": CHAT},
        "chosen[1] needs a role and a text content",
        "chosen",
    ),
    "prompt ends with the assistant": (
        NATIVE | {"prompt": CHAT},
        NATIVE | {"prompt": [*CHAT, {"role": "assistant", "content": "x"}]},
        "the prompt ends with an assistant message",
        "prompt",
    ),
    "another prompt in the messages": (
        CHATS | {"prompt": CHAT},
        CHATS | {"prompt": [{"role": "user", "content": "other"}]},
        "do not start with the prompt's messages",
        "chosen",
    ),
    "winner out of range": (NATIVE, compare(2, 0), "winner is 2, not one of the 2 responses", "comparisons"),
    "loser is text": (NATIVE, compare(0, "1"), "loser is '1'", "comparisons"),
    "compared with itself": (NATIVE, compare(1, 1), "compares response 1 with itself", "comparisons"),
    "weight zero": (NATIVE, compare(0, 1, weight=0), "weight 0.0 is not positive", "comparisons"),
    "weight NaN": (NATIVE, compare(0, 1, weight=float("nan")), "expected a finite number", "comparisons"),
    "gold too short": (NATIVE, NATIVE | {"gold": [1.0]}, "2 responses but 1 values in 'gold'", "gold"),
    "gold with a null": (NATIVE, NATIVE | {"gold": [1.0, None]}, "'gold' has a null", "gold"),
    "one response": (NATIVE, NATIVE | {"responses": ["x"]}, "a preference needs K >= 2 responses", ""),
    "responses not a list": (NATIVE, NATIVE | {"responses": "x"}, "is text (x), expected a list", "responses"),
    "response not a text": (NATIVE, NATIVE | {"responses": ["x", 2]}, "'responses[2]' is a number", "responses"),
    "scores too long": (
        {"prompt": "p", "responses": ["x", "y"], "scores": [1, 2]},
        {"prompt": "p", "responses": ["x", "y"], "scores": [1, 2, 3]},
        "2 responses but 3 values in 'scores'",
        "scores",
    ),
    "ranking from one": (
        {"prompt": "p", "responses": ["x", "y"], "ranking": [1, 0]},
        {"prompt": "p", "responses": ["x", "y"], "ranking": [1, 2]},
        "is not an order of 2 responses",
        "ranking",
    ),
    "label unknown": (PAIR | {"label": 1}, PAIR | {"label": 3}, "label 3 is not one of those known", "label"),
    "label negative": (PAIR | {"label": 1}, PAIR | {"label": -1}, "label -1", "label"),
    "label boolean": (PAIR | {"label": 1}, PAIR | {"label": True}, "label True", "label"),
    "winner's name": (PAIR | {"winner": "A"}, PAIR | {"winner": "C"}, "label 'C'", "winner"),
    "probability": (PAIR | {"probability": 1}, PAIR | {"probability": 1.5}, "not between 0 and 1", "probability"),
    "choice of two": (PAIR | {"choice": 1}, PAIR | {"choice": 2}, "choice 2 is neither 0 nor 1", "choice"),
    "rank as a word": (
        {"prompt": "p", "responses": ["x", "y"], "ranking": ["1", "0"]},
        {"prompt": "p", "responses": ["x", "y"], "ranking": ["1", "first"]},
        "is not an order of 2 responses",
        "ranking",
    ),
    "one-hot word": (
        PAIR | {"winner_model_a": "True", "winner_model_b": "False", "winner_tie": ""},
        PAIR | {"winner_model_a": "yes", "winner_model_b": "False", "winner_tie": ""},
        "'winner_model_a' holds 'yes', expected 1 or 0",
        "winner_model_a",
    ),
    "score of a pair": (
        PAIR | {"score_1": "4", "score_2": "n/a"},
        PAIR | {"score_1": "4/5", "score_2": "2"},
        "'score_1' holds '4/5', expected a finite number",
        "score_1",
    ),
    "score of an answer": (
        {"prompt": "p", "answers": [{"answer": "x", "score": 1}, {"answer": "y", "score": None}]},
        {"prompt": "p", "answers": [{"answer": "x", "score": 1}, {"answer": "y", "score": "4/5"}]},
        "'answers' holds '4/5'",
        "answers",
    ),
    "score of a completion": (
        {"prompt": "p", "completions": [{"response": "x", "overall_score": 1}, {"response": "y", "overall_score": 2}]},
        {"prompt": "p", "completions": [{"response": "x", "overall_score": "low"}] * 2},
        "'overall_score' holds 'low'",
        "overall_score",
    ),
    "margin of a label": (
        PAIR | {"label": 1, "margin": 1},
        PAIR | {"label": 1, "margin": "wide"},
        "'margin' holds 'wide'",
        "margin",
    ),
    "labels too few": (
        {"prompt": "p", "responses": ["x", "y", "z"], "labels": [1, 2, 0]},
        {"prompt": "p", "responses": ["x", "y", "z"], "labels": [1, 2]},
        "3 responses have 3 pairs, but 'labels' has 2 labels",
        "labels",
    ),
    "gold that contradicts": (NATIVE | {"gold": [1, 2]}, NATIVE | {"gold": [1, 3]}, "gold is 3.0 here and 2.0", "gold"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_a_wrong_row_is_named(tmp_path: Path, case: str) -> None:
    good, bad, what, column = ROWS[case]
    path = tmp_path / "bad.jsonl"
    assert refused(path, lines([good, good, bad, good])).what.find(what) >= 0
    error = refused(path, b"\n" + lines([good, bad]))  # a blank line counts: it is the file's line that is named
    assert error.where.startswith(f"{path}, line 3") and error.fix
    assert (f"column {column!r}" in error.where) == bool(column)
    table = refused(tmp_path / "bad.json", json.dumps([good, good, bad]).encode())
    assert ", row 3" in table.where


def test_a_near_miss_in_a_row_is_spelled_out(tmp_path: Path) -> None:
    error = refused(tmp_path / "bad.jsonl", lines([GOOD, {"prompt": "p", "choosen": "x", "rejected": "y"}]))
    assert "did you mean 'chosen'?" in error.fix


# ------------------------------------------------------------------------------------------------- whole files
def test_unknown_columns_name_those_found_and_the_formats_known(tmp_path: Path) -> None:
    error = refused(tmp_path / "bad.jsonl", lines([{"prompt": "p", "choosen": "x", "rejected": "y"}]))
    assert "'prompt', 'choosen', 'rejected'" in error.what
    assert "'choosen': did you mean 'chosen'?" in error.fix
    for name in ("native", "ranked", "scored", "labelled pair", "labelled list", "summaries"):
        assert f"\n           {name}: " in error.fix


def test_recorded_judgements_are_pointed_to_winrate(tmp_path: Path) -> None:
    error = refused(tmp_path / "bad.jsonl", lines([{"preference": 1.2, "generator_1": "a", "generator_2": "b"}]))
    assert "duel winrate" in error.fix


@pytest.mark.parametrize(
    ("columns", "what", "fix"),
    [
        ({"chosen": "god"}, "columns.chosen: no column 'god'", "did you mean 'good'?"),
        ({"choosen": "good"}, "no format has a column 'choosen'", "did you mean 'chosen'?"),
    ],
)
def test_wrong_column_mapping(tmp_path: Path, columns: dict[str, str], what: str, fix: str) -> None:
    records = [{"prompt": "p", "good": "x", "bad": "y"}]
    error = refused(tmp_path / "bad.jsonl", lines(records), columns=columns)
    assert what in error.what
    assert error.fix == fix


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "b.json"])
def test_empty_data(tmp_path: Path, name: str) -> None:
    content = b"[]" if name == "b.json" else b"prompt,chosen,rejected\n" if name == "a.csv" else b"\n"
    error = refused(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert error.what == "the data set is empty"
    assert name in error.where


def test_one_response_throughout(tmp_path: Path) -> None:
    error = refused(tmp_path / "bad.jsonl", lines([NATIVE | {"responses": ["x"]}] * 3))
    assert error.what == "every row has 1 response(s): a preference needs K >= 2 responses"


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([GOOD | {"chosen": ""}, GOOD | {"rejected": " "}], "2 empty"),
        ([GOOD | {"chosen": "y"}], "1 with identical responses"),
        ([{"chosen": "a", "rejected": "b"}], "1 without a shared prompt"),
        ([{"chosen": f"\n\nHuman: {k}\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: b"} for k in "ab"],
         "2 without a shared prompt"),
    ],
)  # fmt: skip
def test_nothing_left(tmp_path: Path, records: list[dict[str, Any]], what: str) -> None:
    error = refused(tmp_path / "bad.jsonl", lines(records))
    assert error.what.startswith(f"no usable row of {len(records)}")
    assert what in error.what


def test_conversations_and_texts_are_not_mixed(tmp_path: Path) -> None:
    records = [GOOD, GOOD, GOOD | {"prompt": CHAT}]
    error = refused(tmp_path / "bad.jsonl", lines(records))
    assert "line 3 holds chat messages, line 1 holds plain text" in error.what
    (tmp_path / "bad.jsonl").write_bytes(lines(records))
    assert read_preferences(str(tmp_path / "bad.jsonl"), conversational=True).report.n_prompts == 2


def test_messages_do_not_become_text(tmp_path: Path) -> None:
    error = refused(tmp_path / "bad.jsonl", lines([GOOD | {"prompt": CHAT}]), conversational=False)
    assert "conversational=False" in error.what


def test_labels_counted_from_zero_are_refused(tmp_path: Path) -> None:
    records = [PAIR | {"prompt": str(k), "label": k % 2} for k in range(20)]
    error = refused(tmp_path / "bad.jsonl", lines(records))
    assert "every label in 'label' is 0 or 1" in error.what
    data = read_preferences(str(tmp_path / "bad.jsonl"), columns={"choice": "label"})
    assert [row.comparisons[0].winner for row in data.rows] == [k % 2 for k in range(20)]


@pytest.mark.parametrize("labels", [[0] * 8, ["0", 0.0] * 4, [0, 1] * 4])
def test_from_eight_labels_on_none_may_be_0_or_1_alone(tmp_path: Path, labels: list[Any]) -> None:
    records = [PAIR | {"prompt": str(k), "label": label} for k, label in enumerate(labels)]
    assert "every label in 'label' is 0" in refused(tmp_path / "bad.jsonl", lines(records)).what
    (tmp_path / "few.jsonl").write_bytes(lines(records[:7]))
    assert read_preferences(str(tmp_path / "few.jsonl")).report.n_ties >= 3
    (tmp_path / "wins.jsonl").write_bytes(lines([record | {"label": 1} for record in records]))
    assert read_preferences(str(tmp_path / "wins.jsonl")).report.n_ties == 0


def test_unknown_annotator(tmp_path: Path) -> None:
    record = {"prompt": "p", "response1": "x", "response2": "y", "annotator1": 1}
    error = refused(tmp_path / "bad.jsonl", lines([record]), annotators=["anotator1"])
    assert (error.what, error.fix) == ("no comparison by annotator 'anotator1'", "did you mean 'annotator1'?")


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    error = refused(tmp_path / "bad.jsonl", lines([GOOD, GOOD | {"chosen": "a\ud83d"}]))
    assert "U+D83D" in error.what
    assert "line 2" in error.where


# ------------------------------------------------------------------------------------------------- broken files
GZIPPED = gzip.compress(lines([GOOD] * 50), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "what", "where"),
    [
        ("a.jsonl", lines([GOOD]) + b'{"prompt": "p"', "invalid JSON", "line 2"),
        ("a.jsonl", b"[1]\n", "a JSON list, expected an object", "line 1"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "not UTF-8 text (byte 0xff)", "line 1"),
        ("a.json", b'[\n{"prompt": "p"},\n}', "invalid JSON", "line 3"),
        ("a.json", b'{"a": 1}', "expected a list", "a.json"),
        ("a.json", b"[1]", "a JSON int, expected an object", "row 1"),
        ("a.json", b"[" * 100_000, "JSON", "a.json"),
        ("a.csv", b"prompt,chosen,rejected\np,x\n", "2 cells, but the header has 3", "row 1"),
        ("a.csv", b"prompt,chosen,rejected\np,x,y\np,x,y,z\n", "4 cells, but the header has 3", "row 2 (line 3)"),
        ("a.csv", b'prompt,chosen,rejected\np,"x,y\n', "invalid CSV", "line 2"),
        ("a.csv", b'prompt,responses,scores\np,"[""x""","[1]"\n', "invalid JSON", "column 'responses'"),
        ("a.parquet", b"PAR1 this is none", "cannot read the Parquet file", "a.parquet"),
        ("a.jsonl.gz", b"plain text", "not a whole gzip file", "a.jsonl.gz"),
        ("a.jsonl.gz", GZIPPED[:-20], "not a whole gzip file", "a.jsonl.gz"),
        ("a.jsonl.gz", GZIPPED[:30] + b"\x00\x01" + GZIPPED[32:], "not a whole gzip file", "a.jsonl.gz"),
        ("a.txt", b"x", "an ending that is not known", "a.txt"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, what: str, where: str) -> None:
    error = refused(tmp_path / name, content)
    assert what in error.what
    assert where in error.where


def test_from_parquet_refuses_other_tables(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["p"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="not a Parquet file of preference rows"):
        from_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="cannot read the file"):
        from_parquet(tmp_path / "missing.parquet")
    to_parquet([PreferenceRow("id", "p", ["a", "b"], [])], tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot read the Parquet file"):
        from_parquet(tmp_path / "cut.parquet")


# ------------------------------------------------------------------------------------------------- names
def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines([GOOD]))
    with pytest.raises(DataError) as caught:
        read_preferences(str(tmp_path / "trian.jsonl"))
    assert "trian.jsonl" in caught.value.what
    assert caught.value.fix == "did you mean 'train.jsonl'?"
    with pytest.raises(DataError, match="does not exist either"):
        read_preferences(str(tmp_path / "nowhere" / "train.jsonl"))


def test_an_unknown_short_name_names_the_nearest_shipped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.preferences import loading

    monkeypatch.setattr(loading, "shipped_names", lambda: {"reviews": "reviews.jsonl.gz"})
    with pytest.raises(DataError, match="did you mean 'reviews'"):
        read_preferences("revews")


def test_an_unreadable_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        read_preferences(str(tmp_path / "empty"))
    assert "cannot load the data set" in caught.value.what


def test_a_split_or_configuration_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes(lines([GOOD]))
    with pytest.raises(DataError) as caught:
        read_preferences(str(tmp_path / "hub"), split="tran")
    assert "Unknown split" in caught.value.what and "train" in caught.value.what
    assert "data.split" in caught.value.fix
    with pytest.raises(DataError) as caught:
        read_preferences(str(tmp_path / "hub"), config="nonsense")
    assert "nonsense" in caught.value.what
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError) as caught:
        read_preferences(str(tmp_path / "saved"), split="tran")
    assert caught.value.fix == "did you mean 'train'?"


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "HF_HUB_OFFLINE"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "refs/convert/parquet"),
        (ValueError("Unknown split \"x\". Should be one of ['train']."), "data.split"),
        (ValueError("BuilderConfig 'c' not found. Available: ['d']"), "data.config"),
        ("DatasetNotFoundError", "hf auth login"),
        ("HfHubHTTPError", "cannot be reached"),
    ],
)
def test_errors_of_the_hub_are_translated(monkeypatch: pytest.MonkeyPatch, error: Any, fix: str) -> None:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    if error == "DatasetNotFoundError":
        error = datasets.exceptions.DatasetNotFoundError(
            "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."
        )
    elif error == "HfHubHTTPError":
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        error.args = ("503 Service Unavailable",)

    def load_dataset(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read_preferences("a/b", config="c", split="x", revision="v1")
    assert fix in caught.value.fix
    assert "a/b (config 'c', split 'x', revision 'v1')" in caught.value.where
    assert str(error).splitlines()[0] in caught.value.what


def test_defects_are_not_disguised_as_wrong_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_args: Any, **_options: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(KeyError, match="a defect"):
        read_preferences("a/b")


@pytest.mark.skipif(not REAL, reason="DUEL_REAL_DATA does not name the folder of real data")
@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("prm800k/train.parquet", "next_response"),
        ("prm800k/test.parquet", "rating"),
        ("llmbar/judge_decisions.csv.gz", "winner_noswap"),
        ("pandalm/judge_gpt35.json.gz", "gpt_result"),
        ("alpaca_eval/annotations/claude.json", "len_baseline"),
        ("alpaca_eval/leaderboard.csv", "win_rate"),
    ],
)
def test_real_files_that_are_no_preference_data(name: str, column: str) -> None:
    with pytest.raises(DataError) as caught:
        read_preferences(str(Path(REAL or "") / name))
    assert f"{column!r}" in caught.value.what
    assert "Known formats:" in caught.value.fix
