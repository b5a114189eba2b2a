"""Folders, data sets on disk and the hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import DataError
from toolkit.preferences.reading import read_preferences


def test_folders_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part, n in (("harmless-base", 2), ("helpful-base", 3)):
        (tmp_path / "hub" / part).mkdir(parents=True)
        lines = [{"prompt": f"{part} {k}", "chosen": "x", "rejected": "y"} for k in range(n)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "hub" / part / "train.jsonl").write_text(text)
    everything = read_preferences(str(tmp_path / "hub"))
    assert everything.report.n_prompts == 5
    part = read_preferences(str(tmp_path / "hub"), config="harmless-base")  # a folder that acts as a configuration
    assert [row.prompt for row in part.rows] == ["harmless-base 0", "harmless-base 1"]
    loaded = datasets.load_dataset(str(tmp_path / "hub"))
    loaded.save_to_disk(str(tmp_path / "all"))
    loaded["train"].save_to_disk(str(tmp_path / "one"))
    for name in ("all", "one"):
        again = read_preferences(str(tmp_path / name))
        assert (again.rows, again.fingerprint) == (everything.rows, everything.fingerprint)


def test_hub_data_goes_through_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options))
        return datasets.Dataset.from_list([{"prompt": "p", "chosen": "x", "rejected": "y"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = read_preferences("someone/prefs-1.0", split="train_prefs", config="c", revision="v2")
    assert asked == [("someone/prefs-1.0", {"name": "c", "split": "train_prefs", "revision": "v2"})]
    assert data.rows[0].responses == ["x", "y"]
    assert len(data.fingerprint) == 64


@pytest.mark.parametrize("held", [True, False])
def test_parquet_that_cannot_be_read_is_told_in_words(
    held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small and large files alike: a column that stands twice, a date that Python does not have, text in no UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not held:
        monkeypatch.setattr("toolkit.preferences.loading.HELD_BYTES", 0)
    path, text = tmp_path / "pairs.parquet", pa.array(["a"])
    damaged = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    cases = [
        (pa.table([text, text, text], names=["prompt", "chosen", "chosen"]), "there are two columns 'chosen'"),
        (pa.table({"prompt": text, "when": pa.array([2**62], pa.timestamp("us"))}), "cannot read the Parquet file"),
        (pa.table({"prompt": text, "chosen": damaged}), "cannot read the Parquet file"),
    ]
    for table, words in cases:
        pq.write_table(table, path)
        with pytest.raises(DataError, match=words) as error:
            read_preferences(str(path))
        assert error.value.fix and str(path) in error.value.where


CHAT = [{"role": "user", "content": "Why?"}]
SIDES = {
    name: [*CHAT, {"role": "assistant", "content": text}] for name, text in (("chosen", "yes"), ("rejected", "no"))
}


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", "saved", "folder of CSV", "folder of JSON lines"])
@pytest.mark.parametrize("held", [True, False])
def test_texts_that_are_json_of_messages_are_messages(
    kind: str, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if not held:
        monkeypatch.setattr("toolkit.preferences.loading.HELD_BYTES", 0)
    records = [{name: json.dumps(value) for name, value in SIDES.items()}] * 2
    text = "".join(json.dumps(record) + "\n" for record in records)
    path = tmp_path / (f"a{kind}" if kind.startswith(".") else "folder")
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif kind == "saved":
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    elif kind == ".json":
        path.write_text(json.dumps(records))
    elif kind == ".jsonl":
        path.write_text(text)
    else:
        path.mkdir()
        if kind == "folder of CSV":
            datasets.Dataset.from_list(records).to_csv(str(path / "train.csv"))
        else:
            (path / "train.jsonl").write_text(text)
    [row] = read_preferences(str(path)).rows
    assert (row.prompt, row.responses) == (CHAT, ["yes", "no"])


def test_json_of_messages_in_every_row_or_in_none(tmp_path: Path) -> None:
    path, record = tmp_path / "a.jsonl", {name: json.dumps(value) for name, value in SIDES.items()}
    asked = {"prompt": "[{} is a list", "chosen": json.dumps(["a", "b"]), "rejected": "[]"}

    def write(*records: dict[str, Any]) -> str:
        path.write_text("".join(json.dumps(each) + "\n" for each in records))
        return str(path)

    assert read_preferences(write(asked)).rows[0].responses == [
        asked["chosen"],
        "[]",
    ]  # a file with lists has texts too
    one = {"prompt": "p", "chosen": record["chosen"], "rejected": "[x]"}  # and text elsewhere in its column
    assert read_preferences(write(one, one | {"chosen": "a"})).rows[0].responses[0] == record["chosen"]
    with pytest.raises(DataError, match="expected JSON of messages") as caught:
        read_preferences(write(*[record] * 100, record | {"rejected": "none"}))
    assert caught.value.where == f"{path}, line 101, column 'rejected'"
    with pytest.raises(DataError, match="lists as Python writes them"):
        read_preferences(write(*[{name: str(value) for name, value in SIDES.items()}] * 3))
    mapped = {"good": record["chosen"], "bad": record["rejected"]}
    [row] = read_preferences(write(mapped), columns={"chosen": "good", "rejected": "bad"}).rows
    assert (row.prompt, row.responses) == (CHAT, ["yes", "no"])
