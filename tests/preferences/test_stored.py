"""Rows that wait on disk: they are those of before, and memory does not grow with their texts."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolkit.errors import DataError, StoreError
from toolkit.preferences import loading
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import Comparison, PreferenceRow, prompt_id
from toolkit.preferences.stored import StoredRows
from toolkit.preferences.tables import to_parquet
from toolkit.preferences.views import one_ahead
from toolkit.storage import spilled
from toolkit.storage.spilled import Spill

ODD = "caf\u00e9 \u2028 line"


def test_a_spill_gives_back_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilled, "BUFFER", 64)  # some of the values are written, the last ones wait
    spill, values = Spill(), [ODD * k for k in range(9)] + [[None, 1.5, {"role": "user"}], ["a", 2**70, "\ud800"]]
    assert [spill.append(value) for value in values] == list(range(len(values)))
    assert [spill[k] for k in range(len(spill))] == values
    assert spill[-1] == values[-1] and spill[3] == values[3]
    with pytest.raises(IndexError):
        spill[len(values)]


def test_a_full_disk_is_an_error_that_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilled, "BUFFER", 1)
    spill = Spill()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spilled.os, "write", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        spill.append("text")
    assert "TMPDIR" in caught.value.fix


def test_stored_rows_are_a_sequence_of_equal_rows() -> None:
    rows = [
        PreferenceRow(f"{k:016x}", ODD, ["a", "b"], [Comparison(0, 1, 0.5, "x", 2.0)], [0.1, 0.2], k, "g" * (k % 2))
        for k in range(5)
    ]
    stored = StoredRows()
    for row in rows:
        stored.add(row, [row.source_row, 7])
    assert stored == rows and rows == stored and stored != rows[:4] and list(stored[1:4:2]) == rows[1:4:2]
    assert stored[-1] == rows[-1] and rows[2] in stored
    assert list(stored.keys()) == [(row.prompt_id, row.group) for row in rows]
    assert stored.response_rows(3) == [3, 7] and stored.n_groups == 1


def test_a_record_is_a_row_without_a_copy(tmp_path: Path) -> None:
    """Rows of one record, and of several: the second repeats a prompt, the third a response, the last is unjudged."""
    tie = [{"winner": 0, "loser": 1, "weight": 0.5}, {"winner": 1, "loser": 0, "weight": 0.5}]
    records = [
        {"prompt": "p", "responses": ["a", "b"], "comparisons": tie, "group": "g"},
        {"prompt": "q", "responses": ["c", "d"], "comparisons": [{"winner": 1, "loser": 0, "annotator": "x"}]},
        {"prompt": "q", "responses": ["d", "e"], "comparisons": [{"winner": 0, "loser": 1, "annotator": "y"}]},
        {"prompt": "r", "responses": ["f", "g", "f"], "comparisons": [{"winner": 1, "loser": 2}], "gold": [1, 2, 1]},
        {"prompt": "s", "responses": ["h", "i"], "comparisons": [], "gold": [3, 4]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = read_preferences(str(path))
    expected = [
        ("p", ["a", "b"], [Comparison(0, 1, 0.5), Comparison(1, 0, 0.5)], None, 1, "g"),
        ("q", ["c", "d", "e"], [Comparison(1, 0, 1.0, "x"), Comparison(1, 2, 1.0, "y")], None, 2, ""),
        ("r", ["f", "g"], [Comparison(1, 0)], [1.0, 2.0], 4, ""),
        ("s", ["h", "i"], [], [3.0, 4.0], 5, ""),
    ]
    assert data.rows == [PreferenceRow(prompt_id(prompt), prompt, *rest) for prompt, *rest in expected]
    assert [data.rows.response_rows(k) for k in range(4)] == [[1, 1], [2, 2, 3], [4, 4], [5, 5]]
    report = data.report
    assert (report.n_comparisons, report.n_ties, report.n_unjudged, report.n_responses) == (4, 1, 1, 9)
    assert report.n_annotators == 2 and report.n_contradictions == 0
    assert len(data.rows._rows) == 2  # those of several records, or that repeat a response


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_large_file_of_lines_reads_as_a_small_one(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{ODD} {k % 7}", "chosen": f"good {k}", "rejected": "bad"} for k in range(40)]
    text = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n \n"
    path = tmp_path / f"rows{ending}"
    path.write_bytes(loading.gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    small = loading.read_file(path)
    monkeypatch.setattr(loading, "HELD_BYTES", 0)
    large = loading.read_file(path)
    assert isinstance(large.records, loading.FileRecords) and large.fingerprint == small.fingerprint
    assert list(large.records) == small.records and len(large.records) == len(rows)
    assert large.records[3] == small.records[3] and large.records[-1] == small.records[-1]
    assert large.records[:5] == small.records[:5]
    assert read_preferences(str(path)).rows == _read_small(path, monkeypatch)


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet"])
def test_a_large_table_reads_as_a_small_one(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"{ODD}, {k % 7}", "chosen": f'good "{k}"\r\n', "rejected": "bad"} for k in range(40)]
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
        raw = b"\xef\xbb\xbf" + text.getvalue().encode()
        path.write_bytes(loading.gzip.compress(raw) if ending.endswith(".gz") else raw)
    small = loading.read_file(path)
    assert [record for _, record in small.records] == rows
    monkeypatch.setattr(loading, "HELD_BYTES", 0)
    large = loading.read_file(path)
    assert isinstance(large.records, loading.FileRecords) and large.fingerprint == small.fingerprint
    assert list(large.records) == small.records and len(large.records) == len(rows)
    assert read_preferences(str(path)).rows == _read_small(path, monkeypatch)


def test_a_large_table_of_our_own_rows_has_their_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [{"role": "user", "content": ODD}]
    rows = [PreferenceRow(prompt_id(prompt), prompt, ["a", "b"], [Comparison(0, 1, 0.5)], source_row=1)]
    path = tmp_path / "rows.parquet"
    to_parquet(rows, path)
    monkeypatch.setattr(loading, "HELD_BYTES", 0)
    assert read_preferences(str(path)).rows == rows


CUT = loading.gzip.compress(b"prompt,chosen,rejected\n" * 99, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "raw", "words", "place"),
    [
        ("rows.csv", b"prompt,chosen,rejected\na,b,c\na,b,\xe9\n", "not UTF-8 text .byte 0xe9", ", line 3"),
        ("rows.csv", b"prompt,chosen,rejected\na,b\n", "2 cells, but the header has 3", ", row 1 (line 2)"),
        ("rows.csv.gz", CUT, "not a whole gzip file", ""),
        ("rows.parquet", b"PAR1 and no more", "cannot read the Parquet file", ""),
    ],
)
def test_a_wrong_row_of_a_large_table_is_named(
    name: str, raw: bytes, words: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    for held in (0, 1 << 20):
        monkeypatch.setattr(loading, "HELD_BYTES", held)
        with pytest.raises(DataError, match=words) as caught:
            read_preferences(str(path))
        assert caught.value.where == f"{path}{place}"


def _read_small(path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredRows:
    monkeypatch.setattr(loading, "HELD_BYTES", 1 << 20)
    return read_preferences(str(path)).rows


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt":', "invalid JSON: Expecting value: line 1 column 11"),
        (b"[1]", "a JSON list"),
        (b"\xe9", "not UTF-8"),
    ],
)
def test_a_wrong_line_of_a_large_file_is_named(
    line: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + b"\n")
    for held in (0, 1 << 20):
        monkeypatch.setattr(loading, "HELD_BYTES", held)
        with pytest.raises(DataError, match=words) as caught:
            read_preferences(str(path))
        assert caught.value.where == f"{path}, line 2"


PEAK = """
import sys
from pathlib import Path
from toolkit.preferences import loading
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.tables import to_parquet
loading.HELD_BYTES = 0
rows = read_preferences(sys.argv[1]).rows
to_parquet(rows, sys.argv[1] + ".parquet")
status = Path("/proc/self/status").read_text().splitlines()
print(len(rows), next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_peak_memory_is_flat_in_the_rows(tmp_path: Path) -> None:
    peaks = []
    for n in (1, 40_000, 80_000):
        path = tmp_path / f"{n}.jsonl"
        with path.open("w") as out:
            for k in range(n):
                texts = {name: f"{name} {k} " * 100 for name in ("prompt", "chosen", "rejected")}
                out.write(json.dumps(texts) + "\n")
        done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
        n_rows, peak = map(int, done.stdout.split())
        assert n_rows == n
        peaks.append(peak)
    empty, one, two = peaks
    n_bytes = path.stat().st_size
    assert two - one < 0.25 * n_bytes / 2 / 1024  # KiB; the texts alone of the further rows would be all of it
    assert two < 1.3 * one + 20_000 and one - empty < 250_000


def test_a_temporary_folder_that_is_not_there_is_an_error_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder(*_: object, **__: object) -> object:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(spilled.tempfile, "TemporaryFile", no_folder)
    with pytest.raises(StoreError, match="temporary") as error:
        Spill()
    assert "TMPDIR" in str(error.value.fix)


def test_a_line_that_cannot_be_read_comes_before_a_row_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a large file, which is read on through to its end once a row is wrong."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "chosen": 5, "rejected": "b"}\n' * 200 + "no JSON\n")
    for held in (loading.HELD_BYTES, 0):
        monkeypatch.setattr(loading, "HELD_BYTES", held)
        with pytest.raises(DataError, match="invalid JSON") as caught:
            read_preferences(str(path))
        assert caught.value.where == f"{path}, line 201"


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "HELD_BYTES", 0)
    path, read = tmp_path / "rows.jsonl", list[int]()
    path.write_text(
        "".join(json.dumps({"prompt": f"p {k}", "chosen": "a", "rejected": "b"}) + "\n" for k in range(250))
    )
    lines = loading._lines_of

    def counted(path: Path) -> Iterator[tuple[int, loading.Record]]:
        for number, record in lines(path):
            read.append(number)
            yield number, record

    monkeypatch.setattr(loading, "_lines_of", counted)
    assert len(read_preferences(str(path)).rows) == 250
    assert read.count(250) == 1  # the first ones are looked at before


def test_a_file_that_goes_while_it_is_read_again_is_an_error_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "HELD_BYTES", 0)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    records = loading.read_file(path).records
    path.unlink()
    with pytest.raises(DataError, match="cannot read the file"):
        list(records)


def test_an_item_that_fails_ahead_of_time_fails_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise DataError("the third one is wrong")

    ahead = one_ahead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(DataError, match="third"):
        next(ahead)
    unread = one_ahead(items())
    assert next(unread) == 1
    unread.close()  # the third one is never asked for
