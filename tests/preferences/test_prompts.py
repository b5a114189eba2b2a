"""Prompts without labels: each way in which a file may hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolkit.errors import DataError
from toolkit.preferences.prompts import UnlabelledPrompt, read_prompts

MESSAGES = [{"role": "user", "content": "Hello"}]


def test_the_same_prompts_from_every_kind_of_file(tmp_path: Path) -> None:
    texts = ["first", "second", "first", " "]
    rows = [{"prompt": text} for text in texts]
    files = {
        "a.txt": "\n".join(texts),
        "a.jsonl": "\n".join(map(json.dumps, rows)),
        "a.json": json.dumps(rows),
        "a.csv": "\n".join(["prompt,topic", *(f"{text},x" for text in texts)]),
        "pairs.jsonl": "\n".join(json.dumps({**row, "chosen": "a", "rejected": "b"}) for row in rows[:3]),
        "labelled.jsonl": "\n".join(json.dumps({**row, "completion": "a"}) for row in rows),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in [*files, "a.parquet"]:
        prompts = read_prompts(str(tmp_path / name), conversational=False)
        assert [item.prompt for item in prompts] == ["first", "second"], name


def test_texts_and_messages(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        json.dumps({"prompt": MESSAGES, "group": "g"}) + "\n" + json.dumps({"prompt": "Hello"}), encoding="utf-8"
    )
    assert read_prompts(str(file), conversational=True) == [UnlabelledPrompt(MESSAGES, "g")]  # the same prompt twice
    with pytest.raises(DataError, match="chat messages, and those of the training data are text"):
        read_prompts(str(file), conversational=False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "there is no prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "line 2, column 'prompt'"),
        ("a.jsonl", '{"text": "a"}', "columns"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as refused:
        read_prompts(str(tmp_path / name), conversational=False)
    assert message in str(refused.value)
