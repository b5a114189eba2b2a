"""Shipped and published preference data have their known counts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from toolkit.preferences.loading import shipped_names
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.splits import pairs

REAL = os.environ.get("DUEL_REAL_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="DUEL_REAL_DATA does not name the folder of real data")

REAL_COUNTS = [
    ("hh_harmless/pairs.jsonl.gz", {"format": "chosen/rejected transcripts", "conversational": True,
     "n_rows_read": 1500, "n_empty": 4, "empty_rows": [87, 517, 926, 1104], "n_unparsable": 0, "n_multi_turn": 1,
     "n_prompts": 1494, "n_responses": 2992, "n_comparisons": 1496, "n_ties": 0, "n_contradictions": 0}),
    ("finegrained_qa_k4/rankings.jsonl.gz", {"format": "labelled list", "conversational": False, "n_rows_read": 350,
     "n_prompts": 350, "n_responses": 1400, "n_comparisons": 2100, "n_ties": 260, "n_empty": 0,
     "ignored_columns": ["passages", "gold", "feedback"]}),
    ("pandalm/pairs.json.gz", {"format": "labelled pair", "n_rows_read": 700, "n_empty": 14, "n_annotators": 3,
     "n_prompts": 123, "n_responses": 507, "n_comparisons": 3 * 686, "n_ties": 316, "n_booleans": 6,
     "n_duplicates": 62, "n_contradictions": 1}),
    ("llmbar/Natural.jsonl", {"n_prompts": 100, "n_responses": 200, "n_comparisons": 100, "n_ties": 0}),
    ("llmbar/Adversarial_Neighbor.jsonl", {"n_prompts": 134, "n_responses": 268, "n_comparisons": 134}),
    ("alpaca_eval/full/alpaca-7b.json.gz", {"n_rows_read": 805, "n_identical": 3, "identical_rows": [200, 371, 714],
     "n_prompts": 802, "n_responses": 1604, "n_comparisons": 802, "n_annotators": 1}),
    ("alpaca_eval/full/vicuna-7b-v1.5.json.gz", {"n_rows_read": 805, "n_identical": 3, "n_prompts": 802}),
]  # fmt: skip


@pytest.mark.skipif("reviews" not in shipped_names(), reason="the shipped data set is not built")
def test_shipped_reviews() -> None:
    report = read_preferences("reviews").report
    assert report.format == "native"
    assert not report.conversational
    assert report.n_prompts == report.n_rows_read >= 600
    assert report.n_annotators == 3
    assert report.warnings() == []


@needs_real_data
@pytest.mark.parametrize(("name", "counts"), REAL_COUNTS, ids=[name for name, _ in REAL_COUNTS])
def test_real_data_counts(name: str, counts: dict[str, Any]) -> None:
    result = read_preferences(str(Path(REAL or "") / name)).report.to_dict()
    assert {key: result[key] for key in counts} == counts


@needs_real_data
def test_real_labels_point_at_the_right_response() -> None:
    folder = Path(REAL or "")
    for record, row in zip(
        [json.loads(line) for line in (folder / "llmbar/Natural.jsonl").read_text(encoding="utf-8").splitlines()],
        read_preferences(str(folder / "llmbar/Natural.jsonl")).rows,
        strict=True,
    ):
        assert row.responses[row.comparisons[0].winner] == record[f"output_{record['label']}"]
    with gzip.open(folder / "hh_harmless/pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    plain = read_preferences(str(folder / "hh_harmless/pairs.jsonl.gz"), conversational=False)
    assert sum(len(row.comparisons) for row in plain.rows) == 1496
    for row in plain.rows:
        assert isinstance(row.prompt, str)
        first = records[row.source_row - 1]
        assert row.prompt + row.responses[0] == first["chosen"]
        assert row.prompt + row.responses[1] == first["rejected"]
    full = json.loads(gzip.decompress((folder / "alpaca_eval/full/alpaca-7b.json.gz").read_bytes()))
    by_prompt = {record["instruction"]: record["preference"] for record in full}
    for row in read_preferences(str(folder / "alpaca_eval/full/alpaca-7b.json.gz")).rows:
        assert 2 - pairs(row)[0].p == pytest.approx(by_prompt[row.prompt], abs=1e-12)
