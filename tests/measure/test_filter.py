"""``duel filter``: rows are kept by their scores, in flat memory, and a killed call continues to the same bytes."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.running import duel

from toolkit import filter_rows
from toolkit.errors import DataError
from toolkit.judging import scorers
from toolkit.measure import filter as filtering
from toolkit.models.load import new_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.stream import row_file
from toolkit.recipe.training import ModelSection

USER = {"role": "user", "content": "Why?"}
JUDGE = """
def count(prompts, completions, **_):
    print("a line that is no JSON")
    return [float("nan") if "nan" in text else float(len(text)) for text in completions]
"""


@pytest.fixture(autouse=True)
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A judge that scores a response by its length."""
    (tmp_path / "filter_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "python:filter_judge:count"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(n: int = 39) -> list[dict[str, Any]]:
    """Bad responses of 1..n characters, so that the threshold for 5% of 39 is 38; and good ones of 30 and 45."""
    bad = [{"prompt": f"bad {k}", "completion": "x" * k, "label": False} for k in range(1, n + 1)]
    return bad + [{"prompt": f"good {k}", "completion": "x" * k, "label": True} for k in (30, 45)]


def rows(n: int = 10) -> list[dict[str, Any]]:
    return [{"prompt": f"é {k}", "response": "y" * (30 + k), "id": k} for k in range(n)]


def saved(path: Path, records: Sequence[dict[str, Any]]) -> str:
    """The records in the format of the ending; a name without one is a data set as ``datasets`` saves it."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    ending = "".join(path.suffixes)
    if ending.startswith(".csv"):
        raw = text.getvalue().encode("utf-8-sig")
        path.write_bytes(gzip.compress(raw) if ending.endswith(".gz") else raw)
    elif ending in (".json", ".json.gz"):
        raw = json.dumps({"data": list(records)} if ending.endswith(".gz") else list(records)).encode()
        path.write_bytes(gzip.compress(raw) if ending.endswith(".gz") else raw)
    elif not ending:
        datasets.Dataset.from_list(list(records)).save_to_disk(str(path))
    else:
        write(path, records)
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_rows_above_the_threshold_are_kept(tmp_path: Path, judge: str) -> None:
    data = write(tmp_path / "data.jsonl", [*rows(), {"prompt": "blank", "response": " ", "id": 10}])
    calibrate = write(tmp_path / "labels.jsonl", labelled())
    done = duel(
        "filter", f"--judge={judge}", f"--data={data}", f"--calibrate={calibrate}", "--fpr=0.05", "--json",
        f"--out={tmp_path / 'out.jsonl.gz'}",
    )  # fmt: skip
    summary = json.loads(done.stdout)
    assert summary["threshold"] == 38.0
    assert summary["fpr"]["target"] == 0.05 and summary["fpr"]["value"] == 2 / 40
    assert 0 < summary["fpr"]["ci_low"] < 0.05 < summary["fpr"]["ci_high"] < 0.2
    assert summary["recall"]["value"] == 0.5
    assert (summary["n_kept"], summary["n_dropped"], summary["n_unscored"]) == (1, 10, 1)
    kept, dropped = lines(tmp_path / "out.jsonl.gz"), lines(tmp_path / "out.dropped.jsonl.gz")
    assert kept == [{**rows()[9], "score": 39.0}]
    assert [row["id"] for row in dropped] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert [row["score"] for row in dropped] == [*map(float, range(30, 39)), None]
    assert json.loads((tmp_path / "out.summary.json").read_text()) == summary
    assert [path.name for path in tmp_path.glob(".out*")] == [".out.jsonl.gz.done.json"]
    plain = ("filter", f"--judge={judge}", f"--data={data}", f"--calibrate={calibrate}", "--fpr=0.05")
    refused = duel(*plain, f"--out={tmp_path / 'out.jsonl'}", check=2)  # its summary would have the same name
    assert "out.summary.json" in refused.stderr and not (tmp_path / "out.jsonl").exists()
    assert json.loads((tmp_path / "out.summary.json").read_text()) == summary


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".csv", ".csv.gz", ""])
def test_every_format_of_data_gives_the_same_rows(tmp_path: Path, judge: str, ending: str) -> None:
    """In chunks or read whole; the number of a row in CSV is a text."""
    data = saved(tmp_path / f"data{ending}", rows(300))
    calibrate = saved(tmp_path / f"labels{ending}", labelled())
    out = tmp_path / "out.jsonl"
    result = filter_rows(data, judge, calibrate=calibrate, fpr=0.05, out=out)
    assert (result["threshold"], result["n_kept"], result["n_dropped"]) == (38.0, 291, 9)
    kept = [{**row, "id": int(row["id"])} for row in lines(out)]
    assert kept == [{**row, "score": float(len(row["response"]))} for row in rows(300)[9:]]
    assert filter_rows(data, judge, calibrate=calibrate, fpr=0.05, out=out) == result


def test_the_shipped_data_by_its_name(tmp_path: Path) -> None:
    result = filter_rows("reviews", "gold", calibrate="reviews", fpr=0.2, out=tmp_path / "out.jsonl.gz")
    assert result["n_kept"] + result["n_dropped"] == 640


@pytest.mark.parametrize("label", [True, False])
def test_a_calibration_set_of_one_class_is_refused(tmp_path: Path, judge: str, label: bool) -> None:
    calibrate = write(tmp_path / "labels.jsonl", [row for row in labelled() if row["label"] is label])
    data = write(tmp_path / "data.jsonl", rows())
    refused = duel(
        "filter", f"--judge={judge}", f"--data={data}", f"--calibrate={calibrate}", "--fpr=0.05",
        f"--out={tmp_path / 'out.jsonl'}", check=2,
    ).stderr  # fmt: skip
    assert ("bad" if label else "good") in refused and "Traceback" not in refused
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", b"prompt,response\na,b,c\n", "3 cells, but the header has 2"),
        ("data.csv", b"prompt,response\na,\xff\n", "not UTF-8"),
        ("data.csv.gz", b"prompt,response", "not a whole gzip file"),
        ("data.json", b"[1]", "expected an object"),
        ("data.tsv", b"prompt", "ending that is not known"),
    ],
)
def test_data_that_cannot_be_read(tmp_path: Path, judge: str, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    calibrate = write(tmp_path / "labels.jsonl", labelled())
    with pytest.raises(DataError, match=message) as caught:
        filter_rows(tmp_path / name, judge, calibrate=calibrate, fpr=0.05, out=tmp_path / "out.jsonl")
    assert name in str(caught.value)


def test_preference_data_in_parquet_goes_by_its_preferred_response(tmp_path: Path, judge: str) -> None:
    pairs = [{"prompt": f"p{k}", "chosen": "c" * (2 * k + 1), "rejected": "r" * (2 * k)} for k in range(1, 101)]
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    common = ["filter", f"--judge={judge}", f"--data={tmp_path / 'pairs.parquet'}", "--fpr=0.1", "--json"]
    out = tmp_path / "kept.parquet"
    summary = json.loads(duel(*common, f"--calibrate={tmp_path / 'pairs.parquet'}", f"--out={out}").stdout)
    assert summary["threshold"] == 182.0  # the rejected ones have 2..200 characters: the tenth highest
    table = pq.read_table(out)
    assert table.schema.names == ["prompt", "chosen", "rejected", "score", "response_scores"]
    assert table["score"].to_pylist() == [float(2 * k + 1) for k in range(91, 101)]
    assert table["response_scores"].to_pylist()[0] == [183.0, 182.0]
    assert pq.read_table(tmp_path / "kept.dropped.parquet").num_rows == summary["n_dropped"] == 90
    again = read_preferences(str(out))
    assert (again.report.n_prompts, again.report.format) == (10, "chosen/rejected")


@pytest.mark.fault
def test_a_killed_call_continues_to_the_same_bytes(tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filtering, "CHUNK", 16)
    common = ["filter", f"--judge={judge}", "--fpr=0.05"]
    common += [f"--data={write(tmp_path / 'data.jsonl', rows(100))}"]
    common += [f"--calibrate={write(tmp_path / 'labels.jsonl', labelled())}"]
    duel(*common, f"--out={tmp_path / 'whole.jsonl'}")
    score, scored = scorers.function_scores, list[int]()

    def killed(spec: str, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        if len(scored) == 6:
            raise KeyboardInterrupt
        scored.append(len(responses))
        return score(spec, prompts, responses)

    monkeypatch.setattr(scorers, "function_scores", killed)
    again = [*common, f"--out={tmp_path / 'out.jsonl'}"]
    duel(*again, check=130)
    assert not (tmp_path / "out.jsonl").exists()
    scored[:] = [0]  # may score five more times
    duel(*again)
    assert sum(scored) == 100 - 3 * 16  # the calibration set and three chunks were there
    for name in ("{}.jsonl", "{}.dropped.jsonl"):
        assert (tmp_path / name.format("out")).read_bytes() == (tmp_path / name.format("whole")).read_bytes()


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, judge: str, ending: str) -> None:
    calibrate, peaks = write(tmp_path / "labels.jsonl", labelled()), []
    for n in (1_000, 10_000):
        data = saved(tmp_path / f"data{n}{ending}", [{"prompt": "p" * 500, "response": "y" * 30}] * n)
        tracemalloc.start()
        duel("filter", f"--judge={judge}", f"--data={data}", f"--calibrate={calibrate}", "--fpr=0.05",
             f"--out={tmp_path / f'out{n}.jsonl'}")  # fmt: skip
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + (1 << 20)


def test_a_reward_model_scores_as_duel_score_does(tmp_path: Path) -> None:
    rm = tmp_path / "rm"
    tokenizer = load_tokenizer(resolve("tiny"))
    model = new_reward_model(resolve("tiny"), ModelSection(dtype="float32"), int(tokenizer.pad_token_id), 0)
    model.save_pretrained(rm)
    tokenizer.save_pretrained(rm)
    pairs = [
        {"prompt": f"The soup number {k} was", "chosen": " good" * (k % 5 + 1), "rejected": " bad"} for k in range(20)
    ]
    data = write(tmp_path / "pairs.jsonl", pairs)
    duel("score", f"--rm={rm}", f"--data={data}", f"--out={tmp_path / 'scores.parquet'}")
    duel(
        "filter", f"--rm={rm}", f"--data={data}", f"--calibrate={data}", "--fpr=0.5", f"--out={tmp_path / 'out.jsonl'}"
    )
    expected = sorted(row["explicit_reward"] for row in pq.read_table(tmp_path / "scores.parquet").to_pylist())
    rows = lines(tmp_path / "out.jsonl") + lines(tmp_path / "out.dropped.jsonl")
    assert sorted(score for row in rows for score in row["response_scores"]) == pytest.approx(expected, abs=1e-5)


def test_from_python_records_are_filtered_as_files_are(tmp_path: Path, judge: str) -> None:
    result = filter_rows(rows(), judge, calibrate=labelled(), fpr=0.05, out=tmp_path / "out.jsonl")
    assert (result["n_kept"], result["threshold"]) == (1, 38.0)
    assert "false positives" in str(result) and lines(tmp_path / "out.jsonl")[0]["id"] == 9


def test_labels_of_a_table_are_numbers_with_a_point(tmp_path: Path, judge: str) -> None:
    """As pandas writes 0 and 1 where a label is missing."""
    calibrate = saved(tmp_path / "labels.csv", [{**row, "label": float(row["label"])} for row in labelled()])
    result = filter_rows(rows(), judge, calibrate=calibrate, fpr=0.05, out=tmp_path / "out.jsonl")
    assert (result["threshold"], result["n_kept"]) == (38.0, 1)


def test_columns_that_nobody_reads_stay_as_they_are(tmp_path: Path, judge: str) -> None:
    calibrate = write(tmp_path / "labels.jsonl", labelled())
    odd = tmp_path / "odd.jsonl"
    odd.write_text("".join(json.dumps({**row, "note": "half a pair: \ud83d"}) + "\n" for row in rows()))
    filter_rows(odd, judge, calibrate=calibrate, fpr=0.05, out=tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl")[0] == {**rows()[9], "note": "half a pair: \ud83d", "score": 39.0}
    when = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    source = saved(tmp_path / "times", [{**row, "when": when} for row in rows()])
    filter_rows(source, judge, calibrate=calibrate, fpr=0.05, out=tmp_path / "times.jsonl")
    assert lines(tmp_path / "times.jsonl")[0]["when"] == "2026-01-02 03:04:00+00:00"
    source = saved(tmp_path / "bytes", [{**row, "image": b"x"} for row in rows()])
    with pytest.raises(DataError, match="a value of type bytes"):
        filter_rows(source, judge, calibrate=calibrate, fpr=0.05, out=tmp_path / "bytes.jsonl")


def test_columns_with_names_of_their_own(tmp_path: Path, judge: str) -> None:
    asked = [{"problem": row["prompt"], "text": row["response"]} for row in rows()]
    known = [{"problem": row["prompt"], "text": row["completion"], "ok": row["label"]} for row in labelled()]
    files = [f"--data={write(tmp_path / 'a.jsonl', asked)}", f"--calibrate={write(tmp_path / 'b.jsonl', known)}"]
    columns = ["--column=prompt=problem", "--column=response=text", "--column=label=ok"]
    duel("filter", f"--judge={judge}", *files, *columns, "--fpr=0.05", f"--out={tmp_path / 'out.jsonl'}")
    assert lines(tmp_path / "out.jsonl") == [{**asked[9], "score": 39.0}]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": labelled(18)}, "18 bad responses are too few.*at least 19"),
        ({"labels": [row for row in labelled() if row["label"]]}, "no response of the calibration set is bad"),
        ({"labels": [row for row in labelled() if not row["label"]]}, "no response of the calibration set is good"),
        ({"labels": [{**row, "label": 3} for row in labelled()]}, "label 3 is neither good nor bad.*row 1"),
        (
            {"labels": [{"prompt": row["prompt"], "completion": "x", "ok": row["label"]} for row in labelled()]},
            "no column is known to hold the label.*--column label=NAME; could be: ok",
        ),
        ({"data": [{"prompt": "p", "text": "t"}]}, "hold the response.*--column response=NAME; could be: prompt, text"),
        ({"data": [*rows(3), {"prompt": "p", "response": "nan"}]}, "the score is nan.*row 4"),
        ({"data": [{**rows()[0], "score": 1}]}, "has a column 'score'"),
        ({"data": [*rows(2), {"prompt": [{"role": "user", "content": "p"}], "response": "r"}]}, "partly.*row 3"),
        (
            {"data": [{"prompt": json.dumps([USER]), "response": "r"}] * 100 + [{"prompt": "plain", "response": "z"}]},
            "'prompt' holds 'plain', expected JSON of messages.*row 101, column 'prompt'",
        ),
        ({"options": ["--column=reply=response"]}, "no format has a column 'reply'"),
        ({"options": ["--column=prompt=qestion"]}, "no file has a column 'qestion'"),
        ({"options": ["--column=chosen=id"]}, "single responses has no column 'chosen'"),
        (
            {"data": [{"prompt": f"Q{k}", "response_a": "a", "response_b": "b", "label": k % 2} for k in range(9)]},
            "every label in 'label' is 0 or 1",
        ),
        ({"options": ["--judge=llm:tiny"]}, "does not score responses"),
        ({"options": ["--out=kept.parquet"]}, "another format than the data"),
        ({"options": ["--fpr=5"]}, "5"),
        ({"options": ["--rm=tiny"]}, "--rm, or a judge with --judge"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, judge: str, change: dict[str, Any], message: str) -> None:
    data = write(tmp_path / "data.jsonl", change.get("data", rows()))
    calibrate = write(tmp_path / "labels.jsonl", change.get("labels", labelled()))
    options = [f"--judge={judge}", f"--data={data}", f"--calibrate={calibrate}", "--fpr=0.05", "--out=out.jsonl"]
    done = duel("filter", *options, *change.get("options", []), cwd=tmp_path, check=2)
    assert re.search(message, done.stderr, flags=re.S), done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.fault
@pytest.mark.parametrize("ending", [".jsonl.gz", ".csv.gz"])
def test_no_damage_of_a_packed_file_is_a_defect_of_ours(tmp_path: Path, ending: str) -> None:
    """A bit of any byte flips: what was packed is refused, or is as before (the name and the time in its head)."""
    path = tmp_path / f"data{ending}"
    if ending == ".csv.gz":
        saved(path, rows())
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows()).encode()))
    packed, refused = path.read_bytes(), 0
    whole = [record for chunk in row_file(str(path), "train").chunks(4) for record in chunk.records]
    for place in range(len(packed)):
        path.write_bytes(packed[:place] + bytes([packed[place] ^ 1]) + packed[place + 1 :])
        try:
            assert [r for chunk in row_file(str(path), "train").chunks(4) for r in chunk.records] == whole
        except DataError as error:
            assert "data" in error.where
            refused += 1
    assert refused > len(packed) / 2
