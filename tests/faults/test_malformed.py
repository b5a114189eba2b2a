"""Every reader refuses malformed input in one message; ``tests/faults/corpus.py`` runs the whole corpus by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from faults.corpus import all_cases
from faults.malformed import Malformed, run_malformed
from hypothesis import given
from hypothesis import strategies as st
from support.preference_files import quick

from toolkit.errors import DataError
from toolkit.judging.records import read_judgements
from toolkit.preferences.prompts import read_prompts
from toolkit.preferences.reading import read_preferences

pytestmark = pytest.mark.fault

CASES = all_cases()
# One seed, so that the fast lane runs the same ones each time; readers of data and settings take no model.
LIGHT = [c for c in CASES if not c.heavy and c.name.split("/")[0] not in ("model", "adapter", "reward-model", "gguf")]
FEW = random.Random(0).sample(LIGHT, 40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = ("prompt", "chosen", "rejected", "response_a", "response_b", "label", "responses", "scores", "messages")
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), JSON, min_size=1, max_size=5), min_size=1, max_size=3)


def checked(case: Malformed, folder: Path) -> None:
    outcome = run_malformed(case, folder)
    assert not outcome.faults, f"{case.name}: {outcome.faults}\n{outcome.message[:2000]}"


def test_the_corpus_is_large_and_names_each_input_once() -> None:
    names = [case.name for case in CASES]
    assert len(names) >= 200 and len(set(names)) == len(names)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_a_selection_of_malformed_inputs(case: Malformed, tmp_path: Path) -> None:
    checked(case, tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_malformed_input(case: Malformed, tmp_path: Path) -> None:
    checked(case, tmp_path / "here")


def read_or_refused(path: Path) -> None:
    """Each reader of rows gives rows or a DataError, and never another exception."""
    for read in (read_preferences, read_prompts, lambda source: read_judgements([source])):
        try:
            read(str(path))
        except DataError as error:
            assert error.what and error.where


@quick
@given(st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt"]))
def test_any_bytes_are_rows_or_a_data_error(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"any{ending}"
    path.write_bytes(content)
    read_or_refused(path)


@quick
@given(ROWS)
def test_any_json_in_a_row_is_read_or_a_data_error(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_or_refused(path)


@pytest.mark.parametrize(
    "label",
    [
        lambda k: k % 2,
        lambda k: float(k % 2),
        lambda k: str(k % 2),
        lambda k: f"{k % 2}.0",
        lambda k: bool(k % 2),
        lambda k: None if k == 7 else k % 2,
        lambda k: (0, "1", 1.0, "0.0")[k % 4],
    ],
    ids=["int", "float", "text", "text of a float", "boolean", "with a null", "mixed"],
)
def test_labels_of_0_and_1_are_refused_whatever_their_type(tmp_path: Path, label: Any) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": f"Q{k}", "response_a": "a", "response_b": "b", "label": label(k)} for k in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="is 0 or 1"):
        read_preferences(str(path))


def test_what_no_model_sees_is_named(tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Hi"}]
    answers = {"chosen": [{"role": "assistant", "content": "x"}], "rejected": [{"role": "assistant", "content": "y"}]}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": parts}], "tools": [1], **answers}))
    data = read_preferences(str(path))
    assert data.rows[0].prompt == [{"role": "user", "content": "Hi"}]
    assert data.report.unseen == {"a part of type 'image'": 1, "column 'tools'": 1}
    assert any("which no model here sees" in warning for warning in data.report.warnings())
