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


def test_rows_of_one_response_have_all_their_prompts(tmp_path: Path) -> None:
    rows = [("p", "a", 3), ("p", "b", 1), ("q", "", 1), ("r", "x", 2), ("", "y", 1), ("r", "z", None)]
    records = [dict(zip(("prompt", "response", "score"), row, strict=True)) for row in rows]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({**record, "group": "g"}) + "\n" for record in records), encoding="utf-8")
    prompts = read_prompts(str(file))
    assert [(item.prompt, item.group, item.where) for item in prompts] == [
        (prompt, "g", f"{file}, line {k}") for prompt, k in (("p", 1), ("q", 3), ("r", 4))
    ]
    assert len(read_prompts(str(file), limit=2)) == 2


def test_the_input_follows_the_instruction(tmp_path: Path) -> None:
    rows = [{"instruction": "Translate.", "input": text, "output": "x"} for text in ("Hello", "Bye", "")]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    prompts = [item.prompt for item in read_prompts(str(file))]
    assert prompts == ["Translate.\n\nHello", "Translate.\n\nBye", "Translate."]


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
